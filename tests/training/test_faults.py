"""Faults in one process: bad steps, spikes, signals. Real Composer, real runs; the process is the test's own."""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from composer.core import Callback, DataSpec, State
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.trainer import Trainer
from rich.console import Console
from torch import Tensor, nn

from callbacks.clock import Clock
from callbacks.culprit import name_culprit
from callbacks.gradients import Gradients
from callbacks.guards import SpikeDetector, StepGuard
from callbacks.ledger import Ledger, nearest_line
from flexbert_core.schema import RunError
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from sweeps.run_result import read_run
from tests.helpers.runs import final_weights, metrics, prepare_dataset, write_config
from training import signals
from training.checkpoints.files import list_checkpoints
from training.faults import lost_rank
from training.folder import RunFolder
from training.trainer import train

ONE_PHASE = ["phases.0.tokens=40K", "phases.1.tokens=2K", "phases.2.tokens=2K"]


class Root(nn.Module):
    """Finite at 0, with an infinite derivative there."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0).sqrt()


class Toy(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first, self.root, self.last = nn.Linear(3, 4, bias=False), Root(), nn.Linear(4, 1, bias=False)
        for layer in (self.first, self.last):
            layer.weight.data = torch.rand(layer.weight.shape, generator=generator) + 0.1

    def forward(self, batch: Tensor) -> Tensor:
        return self.last(self.root(self.first(batch)))

    def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
        return (outputs - 1).square().mean()


def toy_batch(number: int) -> Tensor:
    return torch.rand(4, 3, generator=torch.Generator().manual_seed(number)) + 0.1


def fit(batches: list[Tensor], guard: StepGuard, *others: Callback, optimizer: Any = torch.optim.AdamW) -> Toy:
    """In microbatches of 2. others: callbacks after the guard."""
    model = Toy()
    data = DataSpec(batches, get_num_samples_in_batch=len)
    trainer = Trainer(
        model=model,
        train_dataloader=data,
        max_duration=f"{len(batches)}ba",
        optimizers=optimizer(model.parameters(), lr=0.01),
        callbacks=[guard, *others],
        device_train_microbatch_size=2,
        progress_bar=False,
        seed=1,
    )
    for callback in others:
        if isinstance(callback, Device):
            callback.trainer, trainer.state.auto_microbatching = trainer, True
    try:
        trainer.fit()
    finally:
        trainer.close()
    return model


def guard_of(max_bad_steps: int = 3) -> StepGuard:
    def culprit(state: State) -> str:
        assert isinstance(state.model, nn.Module)
        return name_culprit(state, state.model, state.batch.split(2), 0)

    return StepGuard(max_bad_steps, lambda step: "only", culprit, None)


def plain_loop(batches: list[Tensor], sizes: Sequence[int] = ()) -> tuple[Toy, list[float]]:
    """The reference: PyTorch alone, on these batches in microbatches of these sizes, by default 2; with the losses."""
    model, losses = Toy(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for number, batch in enumerate(batches):
        optimizer.zero_grad()
        parts = batch.split(sizes[number] if sizes else 2)
        each = [model.loss(model(part), part) / len(parts) for part in parts]
        for loss in each:
            loss.backward()
        losses.append(float(sum(loss.detach() for loss in each)))
        optimizer.step()
    return model, losses


BAD = {"nan loss": torch.full((4, 3), math.nan), "infinite gradient": torch.zeros(4, 3)}


@pytest.mark.parametrize("kind", sorted(BAD))
def test_a_bad_step_changes_nothing(kind: str) -> None:
    """Weights after good, bad and skipped steps equal those of a plain loop over the good ones, so Adam's moments and
    step counts were left alone, too."""
    batches = [toy_batch(number) for number in range(8)]
    poisoned = list(batches)
    poisoned[2] = poisoned[3] = poisoned[6] = BAD[kind]
    guard = guard_of()
    guard.skipped = [range(5, 6)]
    found = fit(poisoned, guard)
    expected, _ = plain_loop([batches[number] for number in (0, 1, 5, 7)])
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert guard.bad_steps == 3


class Large(Callback):
    """In one step gradients are finite, and their norm is none of float32's."""

    def after_train_batch(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == 2:
            for parameter in state.model.parameters():
                assert parameter.grad is not None
                parameter.grad.fill_(3e38)


@pytest.mark.parametrize("limit", [None, 1e6])
def test_a_norm_beyond_float32_changes_nothing(tmp_path: Path, limit: float | None) -> None:
    """With clipping, too, which over an infinite norm would make a step of zeros of it: weights decay in that."""
    clock = Clock(1000, Ledger(tmp_path / "ledger.jsonl", []), cast(PhasePlan, None))  # no line is due
    batches, guard = [toy_batch(number) for number in range(5)], guard_of()
    found = fit(batches, guard, Large(), Gradients(clock, limit))
    expected, _ = plain_loop([batches[number] for number in (0, 1, 3, 4)])
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert guard.bad_steps == 1


class Device(Callback):
    """Stands for a GPU whose memory is scarce at one step, in Composer's search for a microbatch that fits."""

    trainer: Trainer

    def __init__(self, kind: str, step: int) -> None:
        self.kind, self.step = kind, step
        self.losses: list[float] = []
        self.passes = 0

    def before_loss(self, state: State, logger: Logger) -> None:
        self.passes += 1
        scarce = state.timestamp.batch == self.step - 1 and state.device_train_microbatch_size == 2
        if scarce and self.kind == "out of memory" and self.passes % 2 == 0:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 rows")

    def after_train_batch(self, state: State, logger: Logger) -> None:
        scarce = state.timestamp.batch == self.step - 1 and state.device_train_microbatch_size == 2
        if scarce and self.kind == "memory freed in a hurry":
            self.trainer.num_consecutive_thrashes = 2

    def batch_end(self, state: State, logger: Logger) -> None:
        assert len(state.batch) == 4
        self.losses.append(float(state.total_loss_dict["loss/train/total"]))


@pytest.mark.parametrize(
    ("kind", "last_of_two", "passes"), [("out of memory", 2, 4 + 2 + 3 * 4), ("memory freed in a hurry", 3, 6 + 2 * 4)]
)
def test_a_batch_that_composer_repeats_is_applied_once(kind: str, last_of_two: int, passes: int) -> None:
    """Before the update or after it: weights, Adam's state and losses are those of a loop that takes each batch once."""
    batches, device, guard = [toy_batch(number) for number in range(5)], Device(kind, step=3), guard_of()
    found = fit(batches, guard, device)
    expected, losses = plain_loop(batches, [2 if step <= last_of_two else 1 for step in range(1, 6)])
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert device.losses == losses
    assert device.passes == passes  # of microbatches: none in vain


def test_a_bad_step_that_composer_repeats_counts_once() -> None:
    batches, device, guard = (
        [toy_batch(number) for number in range(5)],
        Device("memory freed in a hurry", 3),
        guard_of(),
    )
    found = fit([*batches[:2], BAD["nan loss"], *batches[3:]], guard, device)
    expected, _ = plain_loop([batches[number] for number in (0, 1, 3, 4)], [2, 2, 1, 1])
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert guard.bad_steps == 1
    assert [math.isnan(loss) for loss in device.losses] == [False, False, True, False, False]


class NoRoom(torch.optim.SGD):
    """Has no memory for its update, once the first parameter has its own."""

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.param_groups[0]["params"][0].data.add_(1.0)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(("on_shards", "fix"), [(True, "trainer.parallelism=fsdp2"), (False, "another optimizer")])
def test_an_update_without_memory_ends_the_run(on_shards: bool, fix: str) -> None:
    """It may be half done, so the batch is not repeated."""
    device, guard = Device("none", 1), guard_of()
    guard.works_on_shards = on_shards
    with pytest.raises(RunError, match=rf"step 1: no memory for the optimizer's update, .* {fix}, or take a smaller"):
        fit([toy_batch(0)], guard, device, optimizer=NoRoom)
    assert device.passes == 2


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("nan loss", r"first \(Linear\), in the forward"),
        ("infinite gradient", r"first.weight \(Linear\), in the backward"),
    ],
)
def test_bad_steps_in_a_row_end_the_run_and_name_the_module(kind: str, named: str) -> None:
    batches = [toy_batch(0), BAD[kind], toy_batch(1), *[BAD[kind]] * 4]
    with pytest.raises(RunError, match=rf"step 6: .* 3 steps in a row .* first bad module: {named} pass \(rank 0\)"):
        fit(batches, guard_of())


def test_the_spike_rule() -> None:
    """By hand: of losses 1, 3, 1, 3, ... the mean is 2 and the sample deviation of eight is sqrt(8/7)."""
    detector = SpikeDetector(sigmas=2.0, window=8)
    assert all(detector.look(step, 1.0 + 2 * (step % 2), "a") is None for step in range(8))
    limit = 2 + 2 * math.sqrt(8 / 7)
    copy = SpikeDetector(2.0, 8)
    copy.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    assert copy.look(8, limit - 1e-6, "a") is None
    spike = detector.look(8, limit + 1e-6, "a")
    assert spike is not None
    assert spike.sigma == pytest.approx(math.sqrt(8 / 7))
    assert detector.look(9, 100.0, "b") is None  # another phase: nothing to compare with
    assert all(detector.look(10 + step, 100.0 + step % 2, "b") is None for step in range(3))
    assert detector.look(13, 200.0, "b") is not None  # half a window is enough


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_dataset(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(autouse=True)
def _signal_handlers() -> Iterator[None]:
    """A run leaves its handlers behind; this process lives on."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def run(folder: Path, dataset: Path, *overrides: str) -> dict[str, Any]:
    config = load_run_config(write_config(folder, dataset), [*ONE_PHASE, *overrides])
    with signals.from_start_up():
        return train(config, Console(quiet=True))


def at_step(folder: Path, step: int, act: Callable[[], None]) -> threading.Thread:
    """Act as soon as metrics.jsonl holds the step."""

    def watch() -> None:
        end = time.monotonic() + 60
        while max(metrics(folder, "tokens"), default=0) < step and time.monotonic() < end:
            time.sleep(0.002)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_signals_save_and_the_rest_is_bit_equal(dataset: Path, tmp_path: Path) -> None:
    """Stopped four times by each of the signals, also where an evaluation is due: the same weights and metrics."""
    options = ["evaluation.interval=1K", "checkpoint.interval=1B"]
    run(tmp_path / "straight", dataset, *options)
    folder, stops = tmp_path / "stopped", []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        last = max(metrics(folder, "tokens"), default=0)
        watcher = at_step(folder, last + 5, lambda number=number: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stop:
            run(folder, dataset, *options)
        watcher.join()
        assert stop.value.code == signals.EXIT_PREEMPTED == 85
        newest = list_checkpoints(folder / "runs/small/checkpoints")[-1]
        stops.append(json.loads((newest / "state.json").read_text())["run"]["step"])
        assert stops[-1] == max(metrics(folder, "tokens")) >= last + 5  # of the step just finished
    run(folder, dataset, *options)
    assert sorted(set(stops)) == stops
    assert final_weights(folder) == final_weights(tmp_path / "straight")
    for key in ("loss", "tokens", "validation"):
        assert metrics(folder, key) == metrics(tmp_path / "straight", key)


@pytest.mark.slow
def test_a_spike_is_rolled_back_and_its_steps_are_skipped_for_ever(dataset: Path, tmp_path: Path) -> None:
    """The weights are those of a run without the guard, to whose ledger the same steps are added by hand: late, when it
    has checkpoints of the history that is given up by it, as when a kill comes just after the ledger's line."""
    guard = "trainer.spike_guard={sigmas: 0.5, window: 8, skip: 3}"
    options = ["checkpoint.interval=2K", "checkpoint.keep=99"]
    folder = tmp_path / "guarded"
    ledger = folder / "runs/small/ledger.jsonl"
    run(folder, dataset, guard, *options)
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    known = [line for line in lines if "skip" in line]
    skips = [line["skip"] for line in known]
    first, last = skips[0]
    assert last - first == 2
    assert known[0]["spike"]["loss"] > known[0]["spike"]["mean"] + 0.5 * known[0]["spike"]["sigma"]
    losses = metrics(folder)
    skipped = {step for first, last in skips for step in range(first, last + 1)}
    assert {step for step, loss in losses.items() if loss is None} == skipped
    assert "lanes" in (nearest_line(ledger, first) or {})

    told = tmp_path / "told"
    watcher = at_step(told, last + 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        run(told, dataset, *options)
    watcher.join()
    given_up = list_checkpoints(told / "runs/small/checkpoints")[-1]
    assert json.loads((given_up / "state.json").read_text())["run"]["step"] > last
    with (told / "runs/small/ledger.jsonl").open("a") as out:
        out.write("".join(json.dumps(line) + "\n" for line in known))
    run(told, dataset, *options)
    assert weights(told) == weights(folder)
    assert metrics(told) == losses


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in final_weights(folder).items() if name.endswith("safetensors")}


def test_a_run_that_diverges_stops_with_the_module_named(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"step 4: .* 3 steps in a row .* first bad module: model\.\S+ \(\w+\), in the forward"
    ):
        run(tmp_path, dataset, "phases.0.lr=1e30", "phases.0.warmup=0", "trainer.max_bad_steps=3")
    assert metrics(tmp_path, "bad_steps") == {1: 0, 2: 1, 3: 2}
    assert [loss is None for loss in metrics(tmp_path).values()] == [False, True, True]
    folder = RunFolder(tmp_path / "runs/small")
    assert "3 steps in a row" in json.loads(folder.divergence.read_text())["why"]
    assert folder.state(trained=True) == "diverged"
    assert read_run(folder.path).state == "failed"
    folder.open(folder.recorded_config())  # as the next start does
    folder.close()
    assert folder.state(trained=True) == "stopped"


@pytest.mark.slow
def test_checkpoints_for_ever_and_the_best(dataset: Path, tmp_path: Path) -> None:
    run(tmp_path, dataset, "checkpoint.interval=1K", "checkpoint.keep=1", "checkpoint.keep_every=10K", "checkpoint.keep_best=1", "evaluation.interval=5K")  # fmt: skip
    ends = {40 * 1024, 41 * 1024 + 1024, 44 * 1024 + 0}
    losses = {step: result["loss"] for step, result in metrics(tmp_path, "validation").items()}
    tokens = metrics(tmp_path, "tokens")
    kept = {int(path.name[7:]) for path in list_checkpoints(tmp_path / "runs/small/checkpoints")}
    multiples = {-(-n * 10_000 // 1024) * 1024 for n in (1, 2, 3, 4)}
    assert multiples <= kept
    assert tokens[min(losses, key=lambda step: losses[step])] in kept
    assert len(kept) <= len(multiples | ends) + 2


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2213",
        "NCCL error in: ProcessGroupNCCL.cpp:1275, remote process exited or there was a network error, NCCL 2.26.2",
        "NCCL communicator was aborted on rank 3.",
        "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9, OpType=ALLREDUCE) ran for 600000 ms",
    ],
)
def test_a_lost_rank_is_known_by_what_gloo_and_nccl_say(text: str) -> None:
    error = lost_rank(RuntimeError(text))
    assert error is not None
    assert "another rank's process ended" in str(error)
    assert lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
