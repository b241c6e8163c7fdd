"""Section `waits`: where the host waits for the device: in a whole microbatch, from splitting the batch to the end of
backward, in the optimizers' updates, and in the steps of a real run.

In a microbatch it must not: then the host queues the next kernels while the device works. On the CPU, where nothing
waits, the operations that would are counted (tests/helpers/waits.py), and nothing is judged.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.devices import DeviceCPU, DeviceGPU
from composer.loggers import Logger
from rich.console import Console

from benchmarks.gpu_check.data import write_config, write_data
from benchmarks.gpu_check.place import Line, Place, failed, told
from callbacks.watchdog import Watchdog
from data.feed.batches import Batch
from recipe.config import RunConfig, load_run_config
from recipe.slots import OPTIMIZERS
from tests.helpers.waits import Waits
from training.composer_model import PretrainingModel
from training.run import Run

WARM = 2
ROOT = Path(__file__).parent.parent.parent


def check(place: Place) -> Iterator[Line]:
    row, rows = (32, 8) if place.small else (512, 32)
    data = write_data(place.folder / "data", 512, row, 1200)
    model = {"vocab_size": 512, "hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 4}
    model |= {"intermediate_size": 384, "max_position_embeddings": row}
    for compiled in (False, True):
        if compiled and place.small:
            continue
        name = f"waits: of a microbatch{', compiled' if compiled else ''}"
        trainer = {"compile": compiled, "microbatch_size": rows // 2}
        file = write_config(place.folder / name.replace(" ", "-"), data, model, 8, row, rows, trainer=trainer)
        try:
            yield from _of_config(place, load_run_config(file), name)
        except Exception as error:
            yield failed(name, error)
    file = write_config(place.folder / "steps", data, model, 8, row, rows, trainer={"microbatch_size": rows // 2})
    try:
        yield told("waits: of 4 steps of a run, by place", **_of_steps(place, load_run_config(file)))
    except Exception as error:
        yield failed("waits: of 4 steps of a run, by place", error)


def _of_config(place: Place, config: RunConfig, name: str) -> Iterator[Line]:
    with Watchdog(config.trainer.hang_timeout) as watchdog:
        yield from _of_run(place, Run(config, Console(quiet=True), watchdog), name)


def _of_run(place: Place, run: Run, name: str) -> Iterator[Line]:
    if run.config.trainer.compile:
        from training.compiling import compile_blocks

        compile_blocks(run.model, 2)
    model = PretrainingModel(run.model, run.objectives.each, run.parallelism, run.autocast, lambda: 3)
    loader = iter(run.loader)
    batches = [next(loader) for _ in range(WARM + 1)]
    for batch in batches[:WARM]:
        _microbatches(place, run, model, batch)
    batch = batches[WARM]
    with listening(place) as places:
        _microbatches(place, run, model, batch)
    yield told(name, not places if place.on_gpu else None, places=dict(places))
    for optimizer in ("adamw", "stableadamw", "muon"):
        chosen = OPTIMIZERS.build(OPTIMIZERS.parse(optimizer), model=run.model, lr=1e-3)
        for _ in range(WARM):
            _microbatches(place, run, model, batch)
            chosen.step()
        _microbatches(place, run, model, batch)
        with listening(place) as places:
            chosen.step()
        yield told(f"{name}: then of {optimizer}", places=dict(places))
        chosen.zero_grad(set_to_none=True)


def _microbatches(place: Place, run: Run, model: PretrainingModel, batch: Batch) -> None:
    """Forward and backward of each, as Composer has them."""
    device = DeviceGPU() if place.on_gpu else DeviceCPU()
    for part in run.microbatches(batch):
        part = device.batch_to_device(part)
        model.loss(model(part), part).backward()


@contextmanager
def listening(place: Place) -> Iterator[Counter[str]]:
    """Counts where the host waits, within: file and line, or the operation."""
    places: Counter[str] = Counter()
    if not place.on_gpu:
        with Waits() as waits:
            yield places
        places.update(waits.found)
        return
    place.settle()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = _counting(places)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _counting(places: Counter[str]) -> Callable[..., None]:
    def count(message: Any, _category: Any, filename: str, line: int, *_: Any) -> None:
        if "called a synchronizing CUDA operation" in str(message):  # not that the mode is a prototype
            places[f"{'/'.join(Path(filename).parts[-3:])}:{line}"] += 1

    return count


class _Steps(Callback):
    """Listens to some steps of a run."""

    def __init__(self, place: Place, steps: range) -> None:
        self.place, self.steps, self.places, self._context = place, steps, Counter[str](), None

    def before_dataloader(self, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value
        if step == self.steps.start:
            context = listening(self.place)
            self.places, self._context = context.__enter__(), context
        elif step == self.steps.stop and self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None


def _of_steps(place: Place, config: RunConfig) -> dict[str, Any]:
    with Watchdog(config.trainer.hang_timeout) as watchdog:
        run = Run(config, Console(quiet=True), watchdog)
        run.open()
        step = run.resume()
        heard = _Steps(place, range(WARM, WARM + 4))
        run.trainer.state.callbacks.insert(0, heard)
        try:
            run.fit(step)
        finally:
            run.close()
    return {"waits_a_step": sum(heard.places.values()) / 4, "places": dict(heard.places.most_common(30))}
