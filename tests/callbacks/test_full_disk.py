"""Lines of metrics and of the ledger that find no room on the disk: the run goes on, and none is lost once there is."""

from pathlib import Path

import pytest
import torch

from callbacks.ledger import Ledger
from callbacks.metrics_file import MetricsFile
from callbacks.step_log import read_lines
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from tests.helpers.limits import file_size_limit
from tests.helpers.tiny import write_config


def test_metrics_wait_for_room(tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(file, PhasePlan(load_run_config(write_config(tmp_path, tiny_data, 9))))

    def log_step(step: int) -> None:
        metrics.log_metrics({"train/loss": 7.0 - step, "validation/loss": 8.0 - step}, step)
        metrics.flush()

    log_step(1)
    with file_size_limit(file.stat().st_size + 10):  # the next line is torn
        for step in (2, 3, 4):
            log_step(step)
        assert metrics.evaluation_at(3) == {"loss": 5.0}
        assert metrics.latest["step"] == 4
    assert [line["step"] for line in read_lines(file)] == [1]
    assert caplog.text.count("metrics.jsonl: NOT WRITTEN, training goes on: File too large") == 1
    metrics.trim(3)  # as a rollback does
    log_step(4)
    assert [(line["step"], line["loss"]) for line in read_lines(file)] == [(n, 7.0 - n) for n in (1, 2, 3, 4)]


def test_the_ledger_waits_for_room_and_a_rollback_does_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is skipped decides what is trained: a run that cannot note it does not go on."""
    ledger = Ledger(tmp_path / "ledger.jsonl", ["a"])
    ledger.write(1, 100, [], {})
    limit = ledger.file.stat().st_size + 10
    with file_size_limit(limit):
        ledger.write(2, 200, [], {})
    assert [line["step"] for line in read_lines(ledger.file)] == [1]
    assert "ledger.jsonl: NOT WRITTEN, training goes on" in caplog.text
    with file_size_limit(limit), pytest.raises(OSError, match="File too large"):
        ledger.write_skip(1, range(2, 4), {})
    assert ledger.skips() == []
    ledger.write_skip(1, range(2, 4), {})
    assert ledger.skips() == [range(2, 4)]
    assert [line["step"] for line in read_lines(ledger.file)] == [1, 2, 1]


def test_lines_that_are_lost_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", ["a"])
    with file_size_limit(20):
        ledger.write(1, 100, [], {})
        ledger.close(*[torch.nn.Identity()] * 2)  # pyright: ignore[reportArgumentType]
    assert "ledger.jsonl: 1 lines could not be written, and are lost" in caplog.text
