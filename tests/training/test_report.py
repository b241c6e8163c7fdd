"""The card of an export: where its weights come from, and code that runs."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForMaskedLM, AutoTokenizer

from flexbert_core.schema import plain_console
from recipe.config import load_run_config
from tests.helpers.in_process import PER_STEP, branch, go
from tests.helpers.tiny import write_config
from training.checkpoints.files import list_checkpoints
from training.report import closing_table


@pytest.mark.slow
def test_the_card_says_where_the_weights_come_from(tiny_data: Path, tmp_path: Path) -> None:
    first = go(write_config(tmp_path / "first", tiny_data, 2))
    second = go(branch(tmp_path / "second", tiny_data, str(first), 1))
    third = go(branch(tmp_path / "third", tiny_data, str(second), 1))
    export = third / "exports" / f"tokens-{PER_STEP}"
    hugging = go(branch(tmp_path / "hugging", tiny_data, str(export), 1))
    cards = {
        run: (run / "exports" / f"tokens-{steps * PER_STEP}" / "README.md").read_text()
        for run, steps in ((first, 2), (second, 1), (third, 1), (hugging, 1))
    }
    one = f"{PER_STEP:,} of {PER_STEP:,} planned tokens of: full, sparse, empty"
    assert "\nTrained on 512 of 512 planned tokens" in cards[first]
    for run, origin, before in ((second, first, 2), (third, second, 3)):
        where = list_checkpoints(origin / "checkpoints")[-1]
        line = f"Started from the weights of `{where}` (the run run, which had trained on {before * PER_STEP:,} tokens)"
        assert f"\n{line}; then trained on {one}: {(before + 1) * PER_STEP:,} tokens with those before.\n" in cards[run]
    assert (
        f"\nStarted from the weights of `{export}` (a Hugging Face folder); then trained on {one}.\n" in cards[hugging]
    )


def run_snippet(card: str, folder: Path) -> list[Any]:
    """What the card's Python code gives, of the folder."""
    code = card.split("```python\n")[1].split("```")[0].replace("PATH/TO/THIS/FOLDER", str(folder))
    names: dict[str, Any] = {}
    exec(code.replace("print(", "found = ("), names)
    return names["found"]


@pytest.mark.slow
def test_the_cards_snippet_runs(tiny_data: Path, tmp_path: Path) -> None:
    """Also of an export with its own code, and of a tokenizer whose mask is not called [MASK]."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    for file in (data / "tokenizer").iterdir():
        file.write_text(file.read_text().replace("[MASK]", "<mask>"))
    fingerprints(data)
    for number, (folder, mlp) in enumerate(((tiny_data, "glu"), (data, "glu"), (tiny_data, "mlp"))):
        extra = {"model": {"norm": "rmsnorm"}} if mlp == "mlp" else {}
        run = go(write_config(tmp_path / str(number), folder, 1, **extra))
        export = run / "exports" / f"tokens-{PER_STEP}"
        card = (export / "README.md").read_text()
        own = (export / "modeling_flexbert.py").exists()
        assert own == (mlp == "mlp") == ("trust_remote_code=True" in card)
        assert f"brown {'<mask>' if folder == data else '[MASK]'} jumps" in card
        assert len(run_snippet(card, export)) == 5
        assert AutoTokenizer.from_pretrained(export).mask_token in card
        AutoModelForMaskedLM.from_pretrained(export, trust_remote_code=own)


def fingerprints(data: Path) -> None:
    """The streams' manifests name their tokenizer again."""
    from data.tokenizer import fingerprint

    for file in data.glob("*/*/stream.json"):
        manifest = json.loads(file.read_text())
        manifest["tokenizer_fingerprint"] = fingerprint(data / "tokenizer")
        file.write_text(json.dumps(manifest))


def test_paths_of_the_closing_table_are_from_here_and_never_cut(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "a-name-that-is-longer-than-any-terminal-that-anybody-looks-at-a-run-of-this-kind-with"
    config = load_run_config(write_config(tmp_path, tiny_data, 2), [f"name={name}", f"runs={tmp_path}/runs"])
    scores = {"loss": 1.0, "masked_accuracy": 0.5, "unigram_accuracy": 0.1}
    summary = {
        "validation": {**scores, "streams": {"full": scores}},
        "stream_tokens": {"full": 5},
        "tokens": 5,
        "tokens_per_second": 1.0,
        "packing_efficiency": 1.0,
        "seconds": 1.0,
        "train_seconds": 1.0,
        "export": str(config.folder / "exports" / "tokens-5"),
    }
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    closing_table(config, summary, plain_console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert f"export              runs/{name}/exports/tokens-5" in lines
    assert f"metrics             runs/{name}/metrics.jsonl, runs/{name}/tensorboard" in lines
    assert str(tmp_path) not in out.getvalue()
