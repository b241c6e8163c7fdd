"""Section `loop`: a step of `main.py train` (the loader with its processes, Composer, gauges) against a bare loop.

ModernBERT base, rows of 1024, compiled; both train the same model in one process, one after the other.
"""

import itertools
import statistics
import time
from collections.abc import Iterator

from composer.core import Callback, State
from composer.loggers import Logger
from rich.console import Console

from benchmarks.gpu_check.data import write_config, write_data
from benchmarks.gpu_check.place import Line, Place, told
from callbacks.watchdog import Watchdog
from data.feed.loader import build_loader
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from recipe.slots import OPTIMIZERS
from training.microbatches import Microbatches
from training.run import Run
from training.trainer import quiet_libraries

WARM = 5
_BAR = 0.05  # CPU: 3 % for steps of a second (benchmarks.overhead); one here takes a tenth


class _Enough(Exception):
    """The steps are done."""


class _Marks(Callback):
    """The times at which steps begin. After so many it ends the run, without what comes at a run's end."""

    def __init__(self, steps: int) -> None:
        self.steps, self.marks = steps, list[float]()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self.marks.append(time.perf_counter())
        if len(self.marks) > self.steps:
            raise _Enough


def check(place: Place) -> Iterator[Line]:
    quiet_libraries()
    steps, row, rows = (10, 32, 4) if place.small else (45, 1024, 32)
    preset = {"preset": "modernbert-tiny", "hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 64}
    model = preset | {"vocab_size": 512} if place.small else {"preset": "modernbert-base"}
    vocabulary = 512 if place.small else 50368
    data = write_data(place.folder / "data", vocabulary, row, 400 if place.small else 12_000)
    options = {
        "trainer": {"compile": place.on_gpu, "log_interval": 10},
        "checkpoint": {"interval": 1000 * steps * rows * row},
        "evaluation": {"interval": 1000 * steps * rows * row, "max_rows": 4},
    }
    config = load_run_config(write_config(place.folder / "loop", data, model, 100 * steps, row, rows, **options))
    with Watchdog(config.trainer.hang_timeout) as watchdog:
        run = Run(config, Console(quiet=True), watchdog)
        run.open()
        step = run.resume()
        marks = _Marks(steps)
        run.trainer.state.callbacks.insert(0, marks)
        try:
            run.fit(step)
        except _Enough:
            pass
        finally:
            run.close()
    ours = statistics.median(after - before for before, after in itertools.pairwise(marks.marks[WARM:]))
    bare = _bare(place, run)
    over = ours / bare - 1
    yield told(
        "loop: a step of a run takes as long as one of a bare loop",
        over <= _BAR if place.on_gpu else None,
        run_milliseconds=round(1e3 * ours, 2),
        bare_milliseconds=round(1e3 * bare, 2),
        longer_by=round(over, 4),
        tokens_per_second=round(row * rows / ours),
        rows=[rows, row],
    )


def _bare(place: Place, run: Run) -> float:
    """Seconds of a step over batches that are on the device already."""
    model = run.model
    # Composer has wrapped the step of its own.
    optimizer = OPTIMIZERS.build(run.config.optimizer, model=model, lr=1e-4)
    loader = build_loader(PhasePlan(run.config).loader_config(run.config))
    cut = Microbatches(run.config.trainer)
    parts = [cut(batch)[0] for batch, _ in zip(loader, range(4), strict=False)]
    for part in parts:
        for name in ("input_ids", "labels", "cu_seqlens"):
            part[name] = part[name].to(place.device)
    queue = itertools.cycle(parts)

    def step() -> None:
        part = next(queue)
        with run.autocast():
            loss = model(
                part["input_ids"], part["cu_seqlens"], part["max_seqlen"], part["labels"], num_masked=part["masked"]
            ).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(WARM):
        step()
    # By tens, as a run goes: the host does not wait for each.
    return place.seconds(step, repeats=3, inner=2 if place.small else 10)
