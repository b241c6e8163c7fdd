"""Faults of one of two processes: a signal to one stops both, one that hangs or dies does not hang the other."""

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.runs import ROOT, environment, launched, metrics, prepare_dataset, rank, write_config
from training.checkpoints.files import list_checkpoints, load_checkpoint

pytestmark = pytest.mark.slow


def launch(config: Path, *overrides: str) -> "subprocess.Popen[str]":
    arguments = launched(2, "train", str(config), *overrides)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(arguments, cwd=ROOT, env=environment(), **pipes)


def wait_for_step(folder: Path, step: int, process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 120
    while max(metrics(folder, "tokens"), default=0) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_rank_stops_hangs_or_dies(tmp_path: Path) -> None:
    """In a row, each on what the one before left: SIGUSR1 to rank 1; SIGSTOP of rank 1; SIGKILL of rank 0."""
    folder = tmp_path / "run"
    config = write_config(folder, prepare_dataset(tmp_path), endless=True)

    process = launch(config)
    wait_for_step(folder, 3, process)
    rank(process.pid, 1).send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 85, output
    last = max(metrics(folder, "tokens"))
    newest = list_checkpoints(folder / "runs/small/checkpoints")[-1]
    assert load_checkpoint(newest).state["step"] == last  # of the step just finished, on both
    assert "Traceback" not in output

    process = launch(config, "trainer.hang_timeout=20")
    wait_for_step(folder, last + 2, process)
    begin = time.monotonic()
    rank(process.pid, 1).send_signal(signal.SIGSTOP)
    output = process.communicate(timeout=90)[0]
    assert time.monotonic() - begin < 60
    assert process.returncode == 1, output
    assert "rank 0 " in output
    assert "HUNG: no step began or ended for 20 s (trainer.hang_timeout)" in output
    for number in range(2):  # each rank's own stacks, down to the training loop
        part = output.split("----------Begin global rank 1 STDERR----------")[number]
        assert "most recent call first" in part
        assert "_train_loop" in part
    assert "in train\n" in output

    process = launch(config)
    wait_for_step(folder, max(metrics(folder, "tokens")) + 2, process)
    rank(process.pid, 0).kill()
    output = process.communicate(timeout=90)[0]
    assert process.returncode != 0
    assert "error: another rank's process ended" in output
    assert json.loads((folder / "runs/small/environment.json").read_text())["world_size"] == 2
    alive = psutil.process_iter(["cmdline"])  # of one that ends meanwhile: None
    assert not [child for child in alive if str(folder) in " ".join(child.info["cmdline"] or [])]
