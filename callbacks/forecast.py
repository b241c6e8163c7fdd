"""When a run will be done, and what it costs until then."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from composer.core import State
from composer.loggers import Logger

from callbacks.clock import Clock, Window
from callbacks.gauge import Gauge
from recipe.phases import PhasePlan

_LINES = 100  # the pace is that of so many lines: it follows a new phase, and evens out evaluations and checkpoints


class Forecast(Gauge):
    """
    | logged | unit | event, interval |
    |---|---|---|
    | eta_seconds | wall-clock seconds to the end of the last phase, evaluations and checkpoints included | line |
    | cost, cost_to_end | in the unit of trainer.price_per_hour: so far; of the whole run by this pace | line |

    Cost counts the run's processes from start to end, start-up included, not what a kill threw away nor a queue's wait.
    """

    def __init__(
        self,
        clock: Clock,
        plan: PhasePlan,
        seconds: Callable[[], float],
        price_per_hour: float | None,
    ) -> None:
        """seconds: wall clock of the run so far, of all its processes. price_per_hour: of all machines together."""
        super().__init__(clock)
        self.plan, self.seconds, self.price_per_hour = plan, seconds, price_per_hour
        self._pace: deque[tuple[float, int]] = deque(maxlen=_LINES + 1)

    def fit_start(self, state: State, logger: Logger) -> None:
        self._pace.clear()
        self._pace.append((time.monotonic(), self.plan.tokens_before(state.timestamp.batch.value)))

    def read(self, state: State, window: Window) -> dict[str, Any]:
        self._pace.append((time.monotonic(), window.tokens))
        (begin, first), (now, last) = self._pace[0], self._pace[-1]
        eta = (self.plan.total_tokens - last) * (now - begin) / (last - first)
        line = {"eta_seconds": eta}
        if self.price_per_hour is not None:
            seconds = self.seconds()
            line["cost"] = seconds / 3600 * self.price_per_hour
            line["cost_to_end"] = (seconds + eta) / 3600 * self.price_per_hour
        return line
