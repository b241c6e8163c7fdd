"""`train --until`: a run that pauses trains on as if it never had."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from recipe.config import load_run_config
from tests.helpers.in_process import PER_STEP, last
from tests.helpers.ranks import Ranks
from tests.helpers.runs import command, run
from tests.helpers.tiny import STEPS, data_seen, forget_after, write_config
from training.checkpoints.files import list_checkpoints
from training.folder import RunFolder
from training.trainer import train_until

RARE = {"checkpoint": {"interval": 1000 * PER_STEP}}


def go(file: Path, steps: float | None) -> bool:
    """Whether the run is finished."""
    tokens = None if steps is None else round(steps * PER_STEP)
    return train_until(load_run_config(file), Console(quiet=True), tokens) is not None


def lines(folder: Path, key: str) -> dict[int, float]:
    read = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[key] for line in read if key in line}


@pytest.mark.slow
def test_a_run_that_pauses_ends_with_the_same_bits(tiny_data: Path, tmp_path: Path) -> None:
    whole = write_config(tmp_path / "whole", tiny_data, STEPS, **RARE)
    assert go(whole, None)
    paused = write_config(tmp_path / "paused", tiny_data, STEPS, **RARE)
    folder = RunFolder(tmp_path / "paused/run")
    for steps, saved in ((2.1, 3), (3, 3), (1, 3), (5, 5)):
        assert not go(paused, steps)
        assert folder.state(trained=True) == "stopped"
        assert list_checkpoints(folder.checkpoints)[-1].name == f"tokens-{saved * PER_STEP}"
    assert go(paused, STEPS)
    assert go(paused, 1)  # finished is finished
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = last(tmp_path / "paused/run", name), last(tmp_path / "whole/run", name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert lines(tmp_path / "paused", "loss") == lines(tmp_path / "whole", "loss")
    assert data_seen(tmp_path / "paused")[-1] == data_seen(tmp_path / "whole")[-1]
    measured = lines(tmp_path / "paused", "validation")
    assert list(measured) == [3, 5, STEPS]
    assert measured[STEPS] == lines(tmp_path / "whole", "validation")[STEPS]


def test_a_loss_is_there_also_where_the_run_had_been_saved_before(tiny_data: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path, tiny_data, STEPS)  # saves each step, and measures at the end alone
    assert go(file, None)
    forget_after(tmp_path, 4)
    assert list(lines(tmp_path, "validation")) == [STEPS]
    assert not go(file, 4)
    assert list(lines(tmp_path, "validation")) == [4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--until", "0"], "1 token or more"),
        (["--until", "x"], "expected a count"),
        (["--until", "4K", "--dry-run"], "--until"),
    ],
)
def test_what_is_no_place_to_pause(tiny_data: Path, tmp_path: Path, arguments: list[str], line: str) -> None:
    done = run(command("train", str(write_config(tmp_path, tiny_data, STEPS)), *arguments))
    assert done.returncode == 2
    assert line in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_two_ranks_pause_together_and_end_with_the_same_losses(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    whole, paused = (write_config(tmp_path / name, tiny_data, STEPS, **RARE) for name in ("whole", "paused"))
    for arguments in ((str(whole),), (str(paused), "--until", str(3 * PER_STEP)), (str(paused),)):
        said = ranks.train(2, *arguments)
    assert "resuming after step 3" in said
    assert lines(tmp_path / "paused", "loss") == lines(tmp_path / "whole", "loss")
    assert list(lines(tmp_path / "paused", "validation")) == [3, STEPS]
