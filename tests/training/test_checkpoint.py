"""Checkpoints: whole or absent, verified when read, exact; the newest good one is found past damaged ones."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from durable import UNFINISHED, new_folder, remove_unfinished, write_file
from schema import RunError
from training.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    remove_old_checkpoints,
    restore,
    save_checkpoint,
)
from training.optim import OPTIMIZERS


class Tied(nn.Module):
    """Two names for one tensor, as an encoder with a tied decoder has."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(7, 5, generator=generator))
        self.bias = nn.Parameter(torch.randn(7, generator=generator))
        self.decoder = self.embedding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.decoder.T + self.bias


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.entries))
def test_continuing_equals_not_stopping(tmp_path: Path, name: str) -> None:
    config = OPTIMIZERS.parse(name)
    straight = Tied(0)
    steps(straight, OPTIMIZERS.build(config, model=straight, lr=0.1), range(10))

    first = Tied(0)
    optimizer = OPTIMIZERS.build(config, model=first, lr=0.1)
    steps(first, optimizer, range(6))
    save_checkpoint(tmp_path / "tokens-60", first, optimizer, {"step": 6})

    second = Tied(1)
    optimizer = OPTIMIZERS.build(config, model=second, lr=0.1)
    checkpoint = load_checkpoint(tmp_path / "tokens-60")
    restore(checkpoint, second, optimizer)
    assert checkpoint.state == {"step": 6}
    assert second.decoder is second.embedding
    steps(second, optimizer, range(6, 10))
    for ours, theirs in zip(second.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def saved(folder: Path, tokens: int) -> Path:
    model = Tied(tokens)
    optimizer = OPTIMIZERS.build(OPTIMIZERS.parse("stableadamw"), model=model, lr=0.1)
    steps(model, optimizer, range(1))
    save_checkpoint(folder / f"tokens-{tokens}", model, optimizer, {"step": tokens})
    return folder / f"tokens-{tokens}"


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_newest_is_skipped_loudly(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for tokens in (9, 10, 100):
        saved(tmp_path, tokens)
    target = tmp_path / "tokens-100" / file
    if damage == "remove":
        target.unlink()
    elif damage == "truncate":
        os.truncate(target, target.stat().st_size // 2)
    else:
        data = bytearray(target.read_bytes())
        data[len(data) // 2] ^= 1
        target.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.path.name == "tokens-10"  # by number, not by name
    assert "SKIPPING DAMAGED CHECKPOINT" in caplog.text
    assert str(tmp_path / "tokens-100") in caplog.text


def test_none_and_all_damaged(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for tokens in (1, 2):
        (saved(tmp_path, tokens) / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match="all 2 checkpoints are damaged"):
        newest_checkpoint(tmp_path)


def test_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(saved(tmp_path, 5))
    other = nn.Linear(5, 7)
    with pytest.raises(RunError, match="tokens-5: does not fit this model"):
        restore(checkpoint, other, OPTIMIZERS.build(OPTIMIZERS.parse("adamw"), model=other, lr=0.1))


def test_retention_keeps_newest_and_milestones(tmp_path: Path) -> None:
    for tokens in (5, 20, 30, 100, 110):
        saved(tmp_path, tokens)
    remove_old_checkpoints(tmp_path, 2, {20})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["tokens-20", "tokens-100", "tokens-110"]


def test_a_full_disk_leaves_older_checkpoints_whole(tmp_path: Path) -> None:
    """A real limit on file size (RLIMIT_FSIZE) stands for the full disk, in a process of its own."""
    saved(tmp_path, 1)
    child = os.fork()
    if child == 0:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        try:
            saved(tmp_path, 2)
        except RunError as error:
            os._exit(7 if "tokens-2: checkpoint could not be written" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens-1"]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.state == {"step": 1}


def test_new_folder_is_all_or_nothing(tmp_path: Path) -> None:
    def broken() -> None:
        with new_folder(tmp_path / "x") as folder:
            write_file(folder / "a", "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "x") as folder:
        write_file(folder / "a", "one")
        assert not (tmp_path / "x").exists()
    with new_folder(tmp_path / "x") as folder:
        write_file(folder / "a", "two")
        assert (tmp_path / "x" / "a").read_text() == "one"
    assert (tmp_path / "x" / "a").read_text() == "two"
    (tmp_path / (UNFINISHED + "y")).mkdir()
    (tmp_path / (UNFINISHED + "z")).write_text("")
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_state_is_plain_json_and_safetensors(tmp_path: Path) -> None:
    path = saved(tmp_path, 3)
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert json.loads((path / "state.json").read_text())["run"] == {"step": 3}
