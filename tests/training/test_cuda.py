"""A run on a CUDA device: to its end, with evaluation and export, and the same again to the last bit.

Skipped without a device. What differs there from the CPU: NCCL, bfloat16, the optimizer's and attention's own kernels.
"""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.runs import command, run, start
from tests.helpers.tiny import ROW, ROWS, write_config
from training.checkpoints.files import list_checkpoints

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS = 40


def finished(folder: Path, data: Path, **changes: Any) -> Path:
    """The run folder of a run that came to its end."""
    done = run(command("train", str(write_config(folder, data, STEPS, **changes))))
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert Path(summary["export"]).is_dir()
    return folder / "run"


def check_same(first: Path, second: Path) -> None:
    """Weights and optimizer states after the last step, bit by bit."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (list_checkpoints(folder / "checkpoints")[-1] / name for folder in (first, second))
        assert ours.read_bytes() == theirs.read_bytes(), name


@pytest.mark.parametrize("optimizer", ["stableadamw", "adamw", "muon"])
def test_a_run_gives_the_same_bits_again(tmp_path: Path, tiny_data: Path, optimizer: str) -> None:
    first, second = (finished(tmp_path / name, tiny_data, optimizer=optimizer) for name in "ab")
    check_same(first, second)


def test_an_interrupted_run_gives_the_same_bits(tmp_path: Path, tiny_data: Path) -> None:
    straight = finished(tmp_path / "straight", tiny_data)
    file = write_config(tmp_path / "killed", tiny_data, STEPS)
    process = start(file)
    while process.poll() is None and len(list((tmp_path / "killed").glob("run/checkpoints/tokens-*"))) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = len(list_checkpoints(tmp_path / "killed" / "run" / "checkpoints"))
    assert 3 <= reached < STEPS
    check_same(straight, finished(tmp_path / "killed", tiny_data))


@pytest.mark.parametrize("changes", [{"compile": True}, {"parallelism": "fsdp2"}, {"microbatch_size": "auto"}], ids=str)
def test_other_ways_come_to_the_same_loss(tmp_path: Path, tiny_data: Path, changes: dict[str, Any]) -> None:
    """But for what bfloat16 rounds; tokens a step: ROWS rows."""
    losses = []
    for name, options in (("plain", {}), ("other", changes)):
        folder = finished(tmp_path / name, tiny_data, trainer={"log_interval": 1, **options})
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append({line["step"]: line["loss"] for line in lines if line.get("loss") is not None})
        assert max(line["tokens"] for line in lines) == STEPS * ROWS * ROW
    for step, loss in losses[0].items():
        assert losses[1][step] == pytest.approx(loss, rel=0.02), step
