"""What a run has cost by the time of each of its losses: tokens, FLOPs and hours, and its loss at a given cost.

All from the lines of metrics.jsonl. A line speaks of the steps since the one before: slots_per_second gives their
seconds (without evaluation and saving), flops_per_second times seconds their operations. What a kill threw away is in
neither. Between evaluations the loss is interpolated on a straight line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sweeps.results import RunResult

Axis = Literal["tokens", "flops", "hours"]
AXES: tuple[Axis, ...] = ("tokens", "flops", "hours")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Values of a run against what they cost; costs never fall."""

    costs: dict[Axis, Floats]
    values: Floats

    def at(self, axis: Axis, budget: float) -> float | None:
        """Interpolated; None before the first value, behind the last one, or where the cost is not known."""
        costs = self.costs[axis]
        if not len(costs) or np.isnan(costs).any() or not costs[0] <= budget <= costs[-1]:
            return None
        return float(np.interp(budget, costs, self.values))

    def end(self, axis: Axis) -> float | None:
        costs = self.costs[axis]
        return None if not len(costs) or np.isnan(costs[-1]) else float(costs[-1])

    def reaches(self, axis: Axis, value: float) -> float | None:
        """What it had cost when the value was first as low as this; None: never, or not known."""
        below = np.flatnonzero(self.values <= value)
        costs = self.costs[axis]
        if not len(below) or np.isnan(costs).any():
            return None
        last = int(below[0])
        if last == 0:
            return float(costs[0])
        first, second = self.values[last - 1], self.values[last]
        return float(costs[last - 1] + (costs[last] - costs[last - 1]) * (first - value) / (first - second))


class Costs:
    """Tokens, FLOPs and hours of a run by its tokens (slots)."""

    def __init__(self, lines: Sequence[dict[str, Any]]) -> None:
        timed = [line for line in lines if line.get("slots_per_second")]
        tokens = np.array([0.0, *(line["tokens"] for line in timed)])
        rates = np.array([line["slots_per_second"] for line in timed], np.float64)
        flops = np.array([line.get("flops_per_second", np.nan) for line in timed], np.float64)
        seconds = np.diff(tokens) / rates
        self._tokens = tokens
        self._sums: dict[Axis, Floats] = {
            "flops": np.concatenate([[0.0], np.cumsum(seconds * flops)]),
            "hours": np.concatenate([[0.0], np.cumsum(seconds)]) / 3600,
        }

    def at(self, tokens: Sequence[float]) -> dict[Axis, Floats]:
        """NaN where it is not known. Behind the last line at its pace: a run rarely ends on one."""
        places = np.asarray(tokens, np.float64)
        found: dict[Axis, Floats] = {"tokens": places}
        for axis, sums in self._sums.items():
            if len(sums) < 2:
                found[axis] = np.full(len(places), np.nan)
                continue
            pace = (sums[-1] - sums[-2]) / (self._tokens[-1] - self._tokens[-2])
            over = np.maximum(places - self._tokens[-1], 0.0)
            found[axis] = np.interp(places, self._tokens, sums) + over * pace
        return found


def curve(run: RunResult, *path: str) -> Curve:
    """The numbers under these keys, such as ("validation", "loss"), of the lines that have one."""
    found = [(line["tokens"], value) for line in run.lines if (value := _value(line, path)) is not None]
    tokens = [tokens for tokens, _ in found]
    return Curve(Costs([dict(line) for line in run.lines]).at(tokens), np.array([value for _, value in found], float))


def held_out(run: RunResult) -> Curve:
    """The held-out loss, in nats per masked token."""
    return curve(run, "validation", "loss")


def _value(line: Any, path: Sequence[str]) -> float | None:
    for key in path:
        if not isinstance(line, dict):
            return None
        line = line.get(key)
    return line if isinstance(line, int | float) and not isinstance(line, bool) else None
