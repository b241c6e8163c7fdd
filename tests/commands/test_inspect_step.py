"""`inspect RUN --step N` of steps that a rollback skipped; that it shows the loader's batch is in test_run.py."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from commands.inspect_step import inspect_step
from tests.helpers.in_process import go
from tests.helpers.tiny import write_config


def test_a_skipped_step_says_so(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ledger's line is as callbacks.ledger writes it for a rollback."""
    run = go(write_config(tmp_path, tiny_data, 6))
    with (run / "ledger.jsonl").open("a") as ledger:
        spike = {"step": 4, "loss": 9.0, "mean": 2.0, "sigma": 0.1}
        ledger.write(json.dumps({"step": 2, "skip": [3, 4], "spike": spike}) + "\n")
    for step in (2, 3, 4, 5):
        inspect_step(run, step, 1, False, Console(width=10_000))
        skipped = "this step was skipped (loss spike in step 4)" in capsys.readouterr().out
        assert skipped == (step in (3, 4))
        inspect_step(run, step, 1, True, Console())
        for line in capsys.readouterr().out.splitlines():
            assert json.loads(line)["skipped_for_spike_in_step"] == (4 if step in (3, 4) else None)


def test_a_step_to_come_says_so(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = go(write_config(tmp_path, tiny_data, 6))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= 4))
    for step in (4, 5, 6):
        inspect_step(run, step, 1, False, Console(width=10_000))
        said = "not trained yet: the last step that is known is 4" in capsys.readouterr().out
        assert said == (step > 4)
