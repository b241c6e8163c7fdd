"""A run whose rows hold no token to predict says so, shows no loss of 0, and ends with an error and without an export."""

import json
from pathlib import Path

import pytest

from tests.helpers.ranks import Ranks
from tests.helpers.tiny import ROW, ROWS, write_config


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_predicts_nothing_fails(ranks: Ranks, tiny_data: Path, tmp_path: Path, world_size: int) -> None:
    only = {"name": "all", "tokens": 3 * ROWS * ROW, "max_seq_len": ROW, "global_batch_size": ROWS, "lr": 1e-2}
    phases = [{**only, "streams": {"empty": {}}}]  # an evaluation looks at all streams, and must find some
    file, run = write_config(tmp_path, tiny_data, 3, "full", "empty", phases=phases), tmp_path / "run"
    codes, text = ranks.run(world_size, "train", str(file))
    assert codes == [1] * world_size, text
    assert text.count("NOTHING TO PREDICT IN STEP 1: ") == 1
    assert (
        "error: none of the 3 steps had a token to predict: streams full, empty hold special and unknown tokens only"
        in text
    )
    assert "loss 0.000" not in text
    assert list((run / "exports").iterdir()) == []
    assert not (run / "summary.json").exists()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == [None] * 3
    assert ranks.run(1, "train", str(file))[0] == [1]  # nor does it end well when it goes on


def test_text_of_unknown_tokens_alone_never_starts(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    codes, text = ranks.run(1, "train", str(write_config(tmp_path, tiny_data, 3, "empty")))
    assert codes == [2]
    assert "text of special and unknown tokens only wants a tokenizer that knows it" in text
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_steps_without_a_token_do_not_count_in_the_loss(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    """Validation of a stream that has none is a dash, and the others' figures are theirs."""
    file = write_config(tmp_path, tiny_data, 2, "full", "empty")
    text = ranks.train(1, str(file))
    (line,) = [line for line in text.splitlines() if line.startswith("│ empty")]
    assert [cell.strip() for cell in line.strip("│").split("│")][2:] == ["-", "-", "-"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation"]["streams"]["empty"]["loss"] is None
    assert summary["validation"]["loss"] == summary["validation"]["streams"]["full"]["loss"]
    assert ranks.run(1, "status", str(tmp_path / "run"))[0] == [0]
