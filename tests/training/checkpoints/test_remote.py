"""checkpoint.remote against a real S3 server: a machine that lost its disk goes on bit-equal, and failures harm nothing."""

import json
import logging
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import flexbert
from callbacks.ledger import Ledger
from callbacks.step_log import read_lines
from flexbert_core.schema import ConfigError, RunError
from recipe.config import load_run_config
from tests.helpers.ranks import Ranks
from tests.helpers.servers import BUCKET, Bucket, Proxy
from tests.helpers.tiny import ROW, ROWS, write_config
from training import trainer
from training.checkpoints.files import Snapshot, list_checkpoints, load_checkpoint, tokens_of
from training.checkpoints.remote import RemoteCheckpoints, fetch_newest
from training.checkpoints.saver import Saver
from training.folder import RunFolder

STEPS = 6
SLOTS = ROWS * ROW


def name(step: int) -> str:
    return f"tokens-{step * SLOTS}"


class Machine:
    """A run file on a machine with a disk of its own, whose run is copied to s3://data/PREFIX/run."""

    def __init__(self, folder: Path, data: Path, bucket: Bucket, **checkpoint: Any) -> None:
        self.folder, self.data, self.bucket, self.prefix = folder, data, bucket, f"{folder.name}/copies/run"
        self.options = {"remote": f"s3://{BUCKET}/{folder.name}/copies", **checkpoint}

    def train(self, *overrides: str) -> Path:
        file = write_config(self.folder, self.data, STEPS, checkpoint=self.options)
        config = load_run_config(file, ["data.download_retries=0", *overrides])
        trainer.train(config, Console(quiet=True))
        return config.folder

    def lose_disk(self) -> None:
        shutil.rmtree(self.folder / "run")

    def copied(self) -> dict[str, set[str]]:
        """Files by checkpoint."""
        pages = self.bucket.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{self.prefix}/")
        keys = [entry["Key"].removeprefix(f"{self.prefix}/") for page in pages for entry in page.get("Contents", [])]
        found: dict[str, set[str]] = {}
        for key in keys:
            if "/" in key:
                found.setdefault(key.split("/")[0], set()).add(key.split("/")[1])
        return found

    def forget(self, *steps: int, files: str = "") -> None:
        """Delete copies, or their files of that name."""
        for step in steps:
            for file in self.copied()[name(step)]:
                if file.startswith(files):
                    self.bucket.delete(f"{self.prefix}/{name(step)}/{file}")


@pytest.fixture(scope="module")
def straight(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The last checkpoint's tensors of a run that nothing happens to."""
    file = write_config(tmp_path_factory.mktemp("straight"), tiny_data, STEPS)
    trainer.train(load_run_config(file), Console(quiet=True))
    return weights(file.parent / "run")


def weights(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run / "checkpoints" / name(STEPS)).glob("*.safetensors")}


def steps_of(run: Path) -> list[int]:
    return [line["step"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]


@pytest.fixture
def machine(s3: str, bucket: Bucket, tiny_data: Path, tmp_path: Path) -> Machine:
    return Machine(tmp_path, tiny_data, bucket)


def test_a_new_machine_goes_on_to_the_same_bits(machine: Machine, straight: dict[str, bytes]) -> None:
    run = machine.train()
    assert weights(run) == straight
    assert machine.copied().keys() == {path.name for path in list_checkpoints(run / "checkpoints")}
    for path in list_checkpoints(run / "checkpoints"):
        for file in path.iterdir():
            assert machine.bucket.get(f"{machine.prefix}/{path.name}/{file.name}") == file.read_bytes()
    whole = machine.copied()

    machine.forget(5, 6)  # as it was when the machine was lost after step 4 and the copy of its checkpoint
    machine.lose_disk()
    run = machine.train()
    assert weights(run) == straight
    assert steps_of(run) == list(range(1, STEPS + 1))
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == [name(step) for step in (4, 5, 6)]
    assert machine.copied() == whole

    machine.lose_disk()
    with pytest.raises(ConfigError, match=r"this run was started otherwise: phases\.0\.lr was 0\.01, now 0\.02"):
        machine.train("phases.0.lr=0.02")


@pytest.mark.slow
def test_what_is_half_copied_or_damaged_is_skipped_loudly(
    machine: Machine, straight: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    machine.train()
    machine.forget(6, files="manifest")
    key = f"{machine.prefix}/{name(5)}/model.safetensors"
    content = bytearray(machine.bucket.get(key))
    content[-1] ^= 1
    machine.bucket.put(key, bytes(content))
    machine.forget(4, files="state")
    machine.lose_disk()
    run = machine.train()
    for what, step in (("HALF-COPIED", 6), ("DAMAGED", 5), ("DAMAGED", 4)):
        assert f"SKIPPING {what} CHECKPOINT {machine.options['remote']}/run/{name(step)}: " in caplog.text
    assert weights(run) == straight
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == [name(step) for step in (3, 4, 5, 6)]
    for files in machine.copied().values():
        assert len(files) == 4  # mended

    for step in range(1, STEPS + 1):
        machine.bucket.put(f"{machine.prefix}/{name(step)}/state.json", b"{}")
    machine.lose_disk()
    with pytest.raises(RunError, match=r"^s3://data/.*/run: none of the 6 checkpoints is whole: "):
        machine.train()


@pytest.mark.slow
def test_another_teacher_is_refused_on_a_new_machine_too(machine: Machine, tiny_data: Path) -> None:
    teacher = machine.folder / "teacher"
    model = load_run_config(write_config(machine.folder, tiny_data, STEPS)).model
    flexbert.to_hf(flexbert.build(model, seed=1), tiny_data / "tokenizer", teacher)
    learn = f"objective={{name: distill, teacher: {teacher}}}"
    record = (machine.train(learn) / "teacher.json").read_bytes()
    assert machine.bucket.get(f"{machine.prefix}/teacher.json") == record
    machine.forget(5, 6)
    machine.lose_disk()
    shutil.rmtree(teacher)
    flexbert.to_hf(flexbert.build(model, seed=2), tiny_data / "tokenizer", teacher)
    with pytest.raises(ConfigError, match=f"{teacher}: is another model than the one this run has learned from"):
        machine.train(learn)


def back_to(run: Path, step: int) -> None:
    """The run folder as it was when a machine was lost in the step after this one."""
    (run / "summary.json").unlink()
    for path in list_checkpoints(run / "checkpoints"):
        if tokens_of(path) > step * SLOTS:
            shutil.rmtree(path)


@pytest.mark.slow
def test_a_disk_behind_the_copies_catches_up(
    machine: Machine, straight: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """The run was here until step 2, and elsewhere until step 4."""
    run = machine.train()
    back_to(run, 2)
    machine.forget(5, 6)
    run = machine.train()
    assert f"{run}: {name(4)} comes from {machine.options['remote']}/run" in caplog.text
    assert weights(run) == straight
    assert steps_of(run) == list(range(1, STEPS + 1))
    assert machine.copied().keys() == {name(step) for step in range(1, STEPS + 1)}

    caplog.clear()
    back_to(run, 4)
    machine.forget(5, 6)
    machine.train()
    assert "comes from" not in caplog.text  # nothing there was newer
    assert weights(run) == straight


@pytest.mark.slow
def test_damaged_checkpoints_are_replaced_by_their_copies(
    machine: Machine, straight: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    run = machine.train()
    (run / "summary.json").unlink()
    for path in list_checkpoints(run / "checkpoints"):
        (path / "model.safetensors").write_bytes(b"")
    machine.forget(6)
    machine.train()
    assert f"{name(5)} comes from" in caplog.text
    assert weights(run) == straight


@pytest.mark.slow
def test_a_history_that_was_given_up_does_not_come_back(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    """Back at step 2 after a loss spike in step 3, and ended before the next copy: those of steps 3 to 6 are void."""
    run = machine.train()
    void = weights(run)
    back_to(run, 2)
    Ledger(run / "ledger.jsonl", []).write_skip(2, range(3, 4), {})
    machine.train()
    assert "comes from" not in caplog.text
    assert weights(run) != void
    assert machine.copied().keys() == {path.name for path in list_checkpoints(run / "checkpoints")}
    state = machine.bucket.get(f"{machine.prefix}/{name(6)}/state.json")
    assert json.loads(state)["run"]["faults"]["skipped"] == [[3, 3]]


def test_a_server_that_fails_for_a_while(
    proxy: Proxy, bucket: Bucket, tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second and third copy fail; the fourth brings what they left out."""
    machine = Machine(tmp_path, tiny_data, bucket, keep=1, keep_every=2 * SLOTS)
    states: list[set[str]] = []

    def fault(request: str) -> str | None:
        if request.startswith("PUT ") and "/config.yaml" in request:  # the first of a copy
            states.append({step for step, files in machine.copied().items() if "manifest.json" in files})
            return "503 Slow Down" if len(states) in (2, 3) else None
        return None

    proxy.misbehave = fault
    run = machine.train()
    assert "CHECKPOINT NOT COPIED (failure 1 in a row), training goes on: " in caplog.text
    assert "CHECKPOINT NOT COPIED (failure 2 in a row), training goes on: " in caplog.text
    assert "failure 3" not in caplog.text
    # of 2, 4 and 6 steps for ever, and the newest other one; before the fifth copy all of them are there
    assert states[:5] == [set(), {name(1)}, {name(1)}, {name(1)}, {name(2), name(3), name(4)}]
    kept = {name(step) for step in (2, 4, 5, 6)}
    assert machine.copied().keys() == {path.name for path in list_checkpoints(run / "checkpoints")} == kept


@pytest.mark.slow
def test_a_server_that_never_comes_back_ends_the_run_and_harms_nothing(
    proxy: Proxy, bucket: Bucket, tiny_data: Path, tmp_path: Path, straight: dict[str, bytes]
) -> None:
    machine = Machine(tmp_path, tiny_data, bucket, max_failures=2)
    proxy.misbehave = lambda request: "503 Slow Down" if re.match(rf"PUT .*/{name(3)}/optim", request) else None
    with pytest.raises(RunError, match="2 checkpoints in a row could not be written, or copied to checkpoint.remote"):
        machine.train()
    here = list_checkpoints(tmp_path / "run/checkpoints")
    assert [path.name for path in here] == [name(step) for step in (1, 2, 3, 4)]
    assert [load_checkpoint(path).state["step"] for path in here] == [1, 2, 3, 4]
    assert {step for step, files in machine.copied().items() if "manifest.json" in files} == {name(1), name(2)}

    # The last one is tried again at once; then the same command does nothing but copy it.
    proxy.misbehave = lambda request: "503 Slow Down" if re.match(rf"PUT .*/{name(6)}/state", request) else None
    with pytest.raises(RunError, match="the last checkpoint could not be written, or copied"):
        machine.train()
    assert not (tmp_path / "run/summary.json").exists()
    proxy.misbehave = lambda request: None
    run = machine.train()
    assert weights(run) == straight
    assert machine.copied().keys() == {name(step) for step in range(1, STEPS + 1)}

    proxy.stop()
    back_to(run, 5)
    for forget in (lambda: None, machine.lose_disk):  # with a checkpoint here too: there may be newer ones
        forget()
        with pytest.raises(RunError, match=r"^s3://data/.*/run: cannot look for checkpoints: .* to go on without$"):
            machine.train()


@pytest.mark.slow
def test_any_url_of_fsspec_and_ranks(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    """Rank 0 alone copies and fetches, before the others look."""
    options = {"remote": f"file://{tmp_path}/mounted", "keep": 1}
    file = write_config(tmp_path / "here", tiny_data, STEPS, checkpoint=options)
    ranks.train(2, str(file))
    copies = tmp_path / "mounted" / "run"
    assert {path.parent.name for path in copies.glob("*/manifest.json")} == {name(5), name(6)}
    shutil.rmtree(tmp_path / "here" / "run")
    for copied in (copies / name(6)).iterdir():
        copied.unlink()
    assert "run: resuming after step 5, " in ranks.train(2, str(file))
    assert (copies / name(6) / "manifest.json").exists()


def test_what_gets_on_is_no_hang(proxy: Proxy, bucket: Bucket, tiny_data: Path, tmp_path: Path) -> None:
    """The watchdog is told of copies to and fro, which may take longer than trainer.hang_timeout."""
    options = Machine(tmp_path, tiny_data, bucket).options
    config = load_run_config(write_config(tmp_path, tiny_data, STEPS, checkpoint=options))
    beats: list[int] = []
    remote = RemoteCheckpoints(config, lambda: beats.append(1))
    saver = Saver(tmp_path / "run/checkpoints", config.checkpoint, lambda step: False, remote=remote)
    proxy.misbehave = lambda request: time.sleep(0.3)
    ones = {"weight": torch.ones(3)}
    saver.start(saver.folder / name(1), Snapshot(ones, ones, {}), {"step": 1})
    saver.settle()
    assert len(beats) >= 3  # of four files
    beats.clear()
    proxy.misbehave = lambda request: None
    shutil.rmtree(saver.folder / name(1))
    fetch_newest(config, RunFolder(config.folder), lambda: beats.append(1))
    assert load_checkpoint(saver.folder / name(1)).state == {"step": 1}
    assert len(beats) >= 4


def test_a_run_that_stops_does_not_depend_on_the_copy(tiny_data: Path, tmp_path: Path) -> None:
    """Asked to stop, it leaves with the code on which a job is started again; at its end it fails."""
    options = {"remote": "file:///proc/nowhere"}
    config = load_run_config(write_config(tmp_path, tiny_data, STEPS, checkpoint=options))
    saver = Saver(tmp_path / "checkpoints", config.checkpoint, lambda step: False, remote=RemoteCheckpoints(config))
    ones = {"weight": torch.ones(3)}
    saver.start(saver.folder / "tokens-5", Snapshot(ones, ones, {}), {"step": 1})
    saver.settle_last(finished=False)
    assert load_checkpoint(saver.folder / "tokens-5").state == {"step": 1}
    with pytest.raises(RunError, match="the last checkpoint could not be written, or copied"):
        saver.settle_last()


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
