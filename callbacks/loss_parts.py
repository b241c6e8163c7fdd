"""The parts that an objective's loss is the sum of."""

import math
from typing import Any

import torch
from composer.core import State
from composer.loggers import Logger
from torch import Tensor

import ranks
from callbacks.clock import Clock, Window
from callbacks.gauge import Gauge

_Sums = tuple[Tensor, list[float]]  # of each part: the sum of its loss (float64), and what it is a mean over


class LossParts(Gauge):
    """Sums what an objective tells of its loss (training.objectives.Loss.parts): no host sync but when a line is due.

    | logged | unit | event, interval |
    |---|---|---|
    | parts.NAME | mean of the part over what it is counted in, over all ranks, since the last line | AFTER_LOSS, line |

    A part that had nothing to count is left out. Steps that were not applied are not counted.
    """

    def __init__(self, clock: Clock, names: list[str]) -> None:
        """names: of all parts of the run's objectives."""
        super().__init__(clock)
        self.names = names
        self._reduced = torch.zeros(2, len(names), dtype=torch.float64)  # sums and counts, over ranks
        # Sums on the device, counts on the host: to bring one there the host would wait for all that is queued.
        self._local: _Sums | None = None  # this rank's since the last reduction
        self._step: _Sums | None = None  # this rank's of the step under way

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self._step = None  # Composer begins a step anew when it was out of memory

    def after_loss(self, state: State, logger: Logger) -> None:
        parts = state.outputs.parts  # pyright: ignore[reportAttributeAccessIssue]
        if not parts:
            return
        device = next(iter(parts.values()))[0].device
        sums = [
            parts[name][0].double() if name in parts else torch.zeros((), dtype=torch.float64, device=device)
            for name in self.names
        ]
        counts = [float(parts[name][1]) if name in parts else 0.0 for name in self.names]
        self._step = _added(self._step, (torch.stack(sums), counts))

    def take_in(self, state: State) -> None:
        if self._step is not None and math.isfinite(float(state.total_loss_dict["loss/train/total"])):
            self._local = _added(self._local, self._step)
        self._step = None

    def read(self, state: State, window: Window) -> dict[str, Any]:
        self._reduce()
        columns = zip(self.names, self._reduced.T.tolist(), strict=True)
        parts = {name: total / count for name, (total, count) in columns if count}
        self._reduced = torch.zeros_like(self._reduced)
        return {"parts": parts} if parts else {}

    def state_dict(self) -> dict[str, Any]:
        self._reduce()
        return {"sums": self._reduced.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "sums" in state:  # not in checkpoints of before 2026-12
            self._reduced = torch.tensor(state["sums"], dtype=torch.float64)
        self._local = None

    def _reduce(self) -> None:
        if self.names:
            local = torch.zeros_like(self._reduced)
            if self._local is not None:
                sums, counts = self._local
                local = torch.stack([sums.cpu(), torch.tensor(counts, dtype=torch.float64)])
            self._reduced = self._reduced + ranks.over_ranks(local)
        self._local = None


def _added(sums: _Sums | None, more: _Sums) -> _Sums:
    if sums is None:
        return more
    return sums[0] + more[0], [count + other for count, other in zip(sums[1], more[1], strict=True)]
