"""A run that SIGKILL ends, again and again, is the run that it does not: quickly, and at steps that are told.

Kills at random moments, of every file that a run writes: tests/training/test_run.py.
"""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import Ranks
from tests.helpers.runs import ROOT
from tests.helpers.tiny import ROW, ROWS, write_config

STEPS = 6
PER_STEP = ROWS * ROW
KEPT = ("model.safetensors", "optimizer.safetensors")


def last(folder: Path) -> dict[str, bytes]:
    """Weights and optimizer at the end, and the export."""
    name = f"tokens-{STEPS * PER_STEP}"
    files = [folder / "run" / "checkpoints" / name / file for file in KEPT]
    files.append(folder / "run" / "exports" / name / "model.safetensors")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def losses(folder: Path) -> dict[int, Any]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def straight(ranks: Ranks, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    ranks.train(1, str(write_config(folder, tiny_data, STEPS, model={"attention": {"out_dropout": 0.1}})))
    return folder


@pytest.mark.parametrize(
    "event",
    [
        pytest.param("batch_start", marks=pytest.mark.slow),
        pytest.param("after_backward", marks=pytest.mark.slow),
        "batch_end",
    ],
)
def test_sigkill_changes_no_bit(ranks: Ranks, tiny_data: Path, straight: Path, tmp_path: Path, event: str) -> None:
    """Before its first checkpoint and behind one. Checkpoints are rarer than steps, so that steps are repeated."""
    file = write_config(
        tmp_path,
        tiny_data,
        STEPS,
        model={"attention": {"out_dropout": 0.1}},
        checkpoint={"interval": 2 * PER_STEP},
        imports=[str(ROOT / "tests" / "helpers" / "killer.py")],
        callbacks=[{"name": "killer", "steps": [1, 4], "event": event}],
    )
    for step in (1, 4):
        codes, text = ranks.run(1, "train", str(file))
        assert codes == [-signal.SIGKILL], text
        assert (tmp_path / "run" / f"killed-{step}").exists()
    ranks.train(1, str(file))
    assert last(tmp_path) == last(straight)
    assert losses(tmp_path) == losses(straight)
