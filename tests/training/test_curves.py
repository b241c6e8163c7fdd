"""The picture of a run's curves: drawn, or said why it is not."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from recipe.config import load_run_config
from recipe.phases import PhasePlan
from tests.helpers.in_process import go
from tests.helpers.tiny import write_config
from training.curves import draw_curves
from training.trainer import train


def test_no_picture_is_said(tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = go(write_config(tmp_path, tiny_data, 2, trainer={"log_interval": 100}))
    drawn = (run / "curves.png").exists()
    assert drawn != (f"{run / 'curves.png'}: not drawn: no line of metrics.jsonl has a loss" in caplog.text)


def test_a_run_shorter_than_the_log_interval_comes_to_its_end(tiny_data: Path, tmp_path: Path) -> None:
    """It has no line of a training step, so no curves."""
    out = io.StringIO()
    train(load_run_config(write_config(tmp_path, tiny_data, 2, trainer={"log_interval": 10})), Console(file=out))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert Path(summary["export"]).is_dir()
    assert "curves.png" not in out.getvalue()


def test_nothing_is_drawn_where_no_loss_was(tiny_data: Path, tmp_path: Path) -> None:
    plan = PhasePlan(load_run_config(write_config(tmp_path, tiny_data, 2)))
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "tokens": 512, "loss": null}\n')
    assert not draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", plan)
    assert not (tmp_path / "curves.png").exists()
