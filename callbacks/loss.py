"""The loss of training, and how the step that a line is written for was trained."""

import math
from typing import Any

from composer.core import State

from callbacks.clock import Clock, Window
from callbacks.gauge import Gauge
from callbacks.guards import StepGuard, predicted_loss


class Loss(Gauge):
    """
    | logged | unit | event, interval |
    |---|---|---|
    | loss | nats per predicted token, mean over the applied steps since the last line, or null | BATCH_END, line |
    | lr | of the line's step | same |
    | real_tokens | tokens of the run so far that are no padding | same |
    | data_wait | share of the time without evaluation and saving that the loader was waited for, rank 0 | same |
    | bad_steps | steps of the run not applied because loss or gradient was not finite | same |
    """

    def __init__(self, clock: Clock, guard: StepGuard) -> None:
        super().__init__(clock)
        self.guard = guard
        self._sum, self._steps = 0.0, 0

    def take_in(self, state: State) -> None:
        loss = predicted_loss(state)
        if loss is not None:
            self._sum += loss
            self._steps += 1

    def read(self, state: State, window: Window) -> dict[str, Any]:
        line = {
            "loss": self._sum / self._steps if self._steps else math.nan,
            "lr": self.clock.plan.lr(window.step - 1),
            "real_tokens": window.all_real_tokens,
            "data_wait": window.wait_seconds / window.seconds,
            "bad_steps": self.guard.bad_steps,
        }
        self._sum, self._steps = 0.0, 0
        return line

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self._sum, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sum, self._steps = state["loss"], state["steps"]
