"""What measures one thing between two lines of metrics, and logs it when a line is due."""

from collections.abc import Callable
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger

from callbacks.clock import Clock, Window
from callbacks.step_log import flat


class Gauge(Callback):
    """Measures through Composer's events, and logs `train/NAME` for each value of `read` when the clock opens a window.

    The values are the same on all ranks, where a gauge does not say otherwise. `state_dict` and `load_state_dict` (JSON
    values, collectives) carry what a checkpoint inside a window must keep.
    """

    def __init__(self, clock: Clock) -> None:
        """clock: comes before this callback."""
        self.clock = clock

    def batch_end(self, state: State, logger: Logger) -> None:
        self.take_in(state)
        if self.clock.window is not None:
            logger.log_metrics(flat(self.read(state, self.clock.window), "train"))

    def take_in(self, state: State) -> None:
        """Count the step that has just ended."""

    def read(self, state: State, window: Window) -> dict[str, Any]:
        """Values for the line, nested by name, None where one is unknown; then the gauge begins anew. Nothing to say:
        an empty dict. A collective."""
        raise NotImplementedError


class Reading(Gauge):
    """A gauge without memory."""

    def __init__(self, clock: Clock, read: Callable[[], dict[str, Any]]) -> None:
        super().__init__(clock)
        self._read = read

    def read(self, state: State, window: Window) -> dict[str, Any]:
        return self._read()
