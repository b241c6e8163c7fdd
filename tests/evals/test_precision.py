"""Results are of the precision that was computed in."""

from pathlib import Path

import pytest
import torch

from evals.driver import Task
from evals.interface import Model
from tests.helpers.texts import evaluation

ROWS = "text\tother\tlabel\tscore\n" + "the cat\tthe dog\t0\t1.0\nthe dog\tthe cat\t1\t2.0\n" * 3


@pytest.mark.parametrize(
    "name", ["masked", "pseudo_perplexity", "minimal_pairs", "embeddings", "linear_probe", "sts", "glue", "needle"]
)
def test_auto_is_keyed_by_what_it_is_here(name: str, model: Model, tmp_path: Path) -> None:
    """A CPU's results are none of a GPU's."""
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / file).write_text(ROWS)
    (tmp_path / "text.txt").write_text("The cat sat on the mat.\n")
    (tmp_path / "pairs.jsonl").write_text('{"sentence_good": "the cat", "sentence_bad": "cat the", "UID": "order"}\n')
    task = {"name": "own", "data": str(tmp_path), "text": "text", "label": "label", "metrics": ["accuracy"]}
    dev = {"data": str(tmp_path / "dev.tsv")}
    config = {
        "masked": {"texts": {"prose": str(tmp_path / "text.txt")}},
        "pseudo_perplexity": {"texts": {"prose": str(tmp_path / "text.txt")}},
        "minimal_pairs": {"data": str(tmp_path / "pairs.jsonl")},
        "embeddings": {**dev, "first": "text", "second": "other"},
        "linear_probe": {"tasks": [task]},
        "sts": {**dev, "text": "text", "pair": "other"},
        "glue": {"tasks": [task]},
        "needle": {"data": str(tmp_path / "text.txt")},
    }[name]

    def keys(precision: str) -> list[str]:
        of = Task("x", evaluation(name=name, precision=precision, **config), model, tmp_path)
        return [of.key(cell) for cell in of.cells({})]

    here, elsewhere = ("bf16", "fp32") if torch.cuda.is_available() else ("fp32", "bf16")
    assert keys("auto") == keys(here) != keys(elsewhere)
