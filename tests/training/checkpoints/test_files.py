"""Checkpoints: whole or absent, verified when read, exact; the newest good one is found past damaged ones."""

import json
import logging
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch import nn

from flexbert_core.durable import UNFINISHED, new_folder, remove_unfinished, write_file
from flexbert_core.schema import RunError
from recipe.sections import CheckpointConfig
from recipe.slots import OPTIMIZERS
from tests.helpers.limits import file_size_limit
from training.checkpoints.files import (
    Snapshot,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    restore,
    take_snapshot,
    tokens_of,
    write_checkpoint,
)
from training.checkpoints.saver import Saver, remove_old_checkpoints


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
    snapshot = take_snapshot(first, optimizer)
    steps(first, optimizer, range(90, 92))  # training goes on while the snapshot is written
    write_checkpoint(tmp_path / "tokens-60", snapshot, {"step": 6})

    second = Tied(1)
    optimizer = OPTIMIZERS.build(config, model=second, lr=0.1)
    checkpoint = load_checkpoint(tmp_path / "tokens-60")
    restore(checkpoint, second, optimizer)
    assert checkpoint.state == {"step": 6}
    assert second.decoder is second.embedding
    steps(second, optimizer, range(6, 10))
    for ours, theirs in zip(second.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def saved(folder: Path, tokens: int, validation_loss: float | None = None) -> Path:
    model = Tied(tokens)
    optimizer = OPTIMIZERS.build(OPTIMIZERS.parse("stableadamw"), model=model, lr=0.1)
    steps(model, optimizer, range(1))
    state = {"step": tokens, "validation_loss": validation_loss}
    write_checkpoint(folder / f"tokens-{tokens}", take_snapshot(model, optimizer), state)
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
    with pytest.raises(RunError, match="none of the 2 checkpoints is whole"):
        newest_checkpoint(tmp_path)


def test_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(saved(tmp_path, 5))
    other = nn.Linear(5, 7)
    with pytest.raises(RunError, match="tokens-5: does not fit this model"):
        restore(checkpoint, other, OPTIMIZERS.build(OPTIMIZERS.parse("adamw"), model=other, lr=0.1))


def test_retention(tmp_path: Path) -> None:
    """Newest 3 of those not permanent (20 and 30 are), and the best one: 40, not the permanent 20 nor the equal 5."""
    losses = {5: 2.0, 20: 1.0, 30: None, 40: 2.0, 100: 3.0, 110: None}
    for tokens, loss in losses.items():
        saved(tmp_path, tokens, loss)
    saved(tmp_path, 120)
    damaged = saved(tmp_path, 130)
    (damaged / "state.json").unlink()
    for_ever = {20, 30}.__contains__
    remove_old_checkpoints(tmp_path, CheckpointConfig(keep=3, keep_best=1), for_ever, tmp_path / "tokens-120")
    assert [tokens_of(path) for path in list_checkpoints(tmp_path)] == [20, 30, 40, 100, 110, 120]
    remove_old_checkpoints(tmp_path, CheckpointConfig(keep=1), lambda step: step == 30, tmp_path / "tokens-120")
    assert [tokens_of(path) for path in list_checkpoints(tmp_path)] == [30, 120]


def test_a_full_disk_harms_no_older_checkpoint_and_is_never_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training goes on; the next one may work; `max_failures` in a row end the run; the last one is tried again."""
    saver = Saver(tmp_path, CheckpointConfig(keep=1, max_failures=2), lambda step: False)

    def start(tokens: int) -> None:
        model = Tied(tokens)
        optimizer = OPTIMIZERS.build(OPTIMIZERS.parse("stableadamw"), model=model, lr=0.1)
        saver.settle()
        saver.start(tmp_path / f"tokens-{tokens}", take_snapshot(model, optimizer), {"step": tokens})

    start(1)
    saver.settle()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with file_size_limit(300):
        start(2)
        saver.settle()
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert "CHECKPOINT NOT WRITTEN (failure 1 in a row)" in caplog.text
    assert "tokens-2: checkpoint could not be written" in caplog.text
    start(3)
    saver.settle()
    assert [path.name for path in tmp_path.iterdir()] == ["tokens-3"]
    with file_size_limit(300):
        start(4)
        start(5)
        with pytest.raises(RunError, match="2 checkpoints in a row could not be written"):
            saver.settle()
        saver = Saver(tmp_path, saver.config, saver.is_permanent)
        start(6)
        with pytest.raises(RunError, match="the last checkpoint could not be written"):
            saver.settle_last()
    saver.settle_last()
    assert [path.name for path in tmp_path.iterdir()] == ["tokens-6"]
    assert load_checkpoint(tmp_path / "tokens-6").state == {"step": 6}


def test_a_crash_of_the_writing_thread_is_loud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saver = Saver(tmp_path, CheckpointConfig(), lambda step: False)
    saver.start(tmp_path / "tokens-1", Snapshot({}, {}, {}), {"step": object()})  # no JSON value: a bug
    with pytest.raises(TypeError, match="not JSON serializable"):
        saver.settle()
    assert "the thread that writes checkpoints crashed" in caplog.text
    assert list(tmp_path.iterdir()) == []


class Payload:
    """A pickle that, loaded, leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def test_a_pickle_in_a_checkpoint_is_never_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither beside our files nor in their place, even with hashes that fit; by Python's own audit of unpickling."""
    found: list[str] = []
    sys.addaudithook(lambda event, arguments: found.append(event) if event == "pickle.find_class" else None)
    pickled = pickle.dumps(Payload(tmp_path / "loaded"))
    pickle.loads(pickled)
    assert found  # the hook sees it
    assert (tmp_path / "loaded").exists()
    (tmp_path / "loaded").unlink()
    found.clear()
    good = saved(tmp_path, 1)
    for name in ("model.pt", "state.pkl", ".metadata"):
        (good / name).write_bytes(pickled)
    for tokens, name in enumerate(("model.safetensors", "optimizer.safetensors", "state.json"), 2):
        manifest = json.loads((saved(tmp_path, tokens) / "manifest.json").read_text())
        (tmp_path / f"tokens-{tokens}" / name).write_bytes(pickled)
        manifest["files"][name] = {"bytes": len(pickled), "xxh3_64": xxhash.xxh3_64_hexdigest(pickled)}
        (tmp_path / f"tokens-{tokens}" / "manifest.json").write_text(json.dumps(manifest))
    unlisted = json.loads((saved(tmp_path, 5) / "manifest.json").read_text())
    del unlisted["files"]["model.safetensors"]
    (tmp_path / "tokens-5" / "manifest.json").write_text(json.dumps(unlisted))
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.path == good
    assert caplog.text.count("SKIPPING DAMAGED CHECKPOINT") == 4
    assert found == []
    assert not (tmp_path / "loaded").exists()


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
    assert json.loads((path / "state.json").read_text())["run"] == {"step": 3, "validation_loss": None}
