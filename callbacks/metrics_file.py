"""metrics.jsonl: what every callback logs, a line for each step that something was logged in."""

import logging
import math
import reprlib
from pathlib import Path
from typing import Any

import torch
from composer.core import State
from composer.loggers import Logger, LoggerDestination

import ranks
from callbacks.step_log import StepLines, nested, read_lines
from recipe.phases import PhasePlan

log = logging.getLogger(__name__)
# Composer's trainer logs these at every step: clocks that count what `step` and `tokens` say, and the loss of a step.
_OF_THE_TRAINER = ("time/", "trainer/", "loss/train/total")


class MetricsFile(LoggerDestination):
    """Writes {"step", where the plan stands then, the metrics of the step} (rank 0).

    Metrics named `train/...` are ours: they stand in the line itself, nested at each slash. All others keep their
    prefix: `validation/loss` is line["validation"]["loss"]. A number that is not finite is null. What is no number is
    left out with a warning, what Composer's trainer logs of each step by itself without one.
    Lines that find no room on the disk are written when there is some.
    A metric logged while a step is under way belongs to that step, so that a restart neither repeats nor loses one.
    """

    def __init__(self, file: Path, plan: PhasePlan) -> None:
        self.file, self.plan = file, plan
        self._lines = StepLines(file)
        self.latest: dict[str, Any] = {}
        """The newest line with a loss that this process wrote; empty before the first."""
        self.others: dict[str, float] = {}
        """The newest value of each metric that is not ours, by its whole name."""
        self._step, self._metrics = 0, dict[str, Any]()
        self._under_way: int | None = None  # finished steps while the next one runs
        self._refused = set[str]()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._under_way = state.timestamp.batch.value

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        found = {name: value for name, value in metrics.items() if not name.startswith(_OF_THE_TRAINER)}
        if not found or ranks.rank() != 0:
            return
        step = self._step if step is None else step + (step == self._under_way)
        if step != self._step:
            self.flush()
        self._step = step
        for name, value in found.items():
            if (number := _number(value)) is not None:
                self._metrics[name] = number
                if not name.startswith(("train/", "validation")):
                    self.others[name] = number
            elif name not in self._refused:
                self._refused.add(name)
                said = reprlib.repr(value)
                log.warning("metric %s: %s is no number: left out (this is said once)", name, said)

    def batch_end(self, state: State, logger: Logger) -> None:
        self._under_way = None
        self.flush()

    def close(self, state: State, logger: Logger) -> None:
        self.flush()
        self._lines.close()

    def flush(self) -> None:
        """Write the line of the step that was logged last. Before a checkpoint: a kill must not lose the line."""
        if not self._metrics:
            return
        node = nested({name: value if math.isfinite(value) else None for name, value in self._metrics.items()})
        self._metrics = {}
        line = {"step": self._step, **self.plan.facts(self._step), **node.pop("train", {}), **node}
        if "loss" in line:
            self.latest = line
        self._lines.append(line)

    def trim(self, step: int) -> None:
        """Drop the lines of steps that a restart will repeat (rank 0)."""
        self._metrics = {}
        self._lines.trim(step)

    def evaluation_at(self, step: int, key: str = "validation") -> dict[str, Any] | None:
        """The evaluation after `step` steps, also one made before a restart (rank 0)."""
        self.flush()
        lines = [*read_lines(self.file), *self._lines.waiting]
        return next((line[key] for line in lines if line["step"] == step and key in line), None)


def _number(value: Any) -> float | None:
    """A metric as JSON holds it; None for what is no single number."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:  # of numpy
        value = value.item()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
