"""The time and the tokens between two lines of metrics."""

import time
from dataclasses import dataclass

from composer.core import Callback, State
from composer.loggers import Logger

from callbacks.ledger import Ledger
from recipe.phases import PhasePlan


@dataclass(frozen=True)
class Window:
    """The steps since the last line of metrics.

    step: finished steps of the run. tokens, all_real_tokens: slots and real tokens of the run so far. slots,
    real_tokens: of these steps, over all ranks. seconds: of these steps, without evaluation and saving. wait_seconds:
    of them, until the loader gave its batches, on this rank.
    """

    step: int
    tokens: int
    all_real_tokens: int
    slots: int
    real_tokens: int
    seconds: float
    wait_seconds: float


class Clock(Callback):
    """Opens a window at each step that a line of metrics is due; the gauges behind it in the list of callbacks read it.

    | logged | unit | event |
    |---|---|---|
    | nothing; see the gauges | | BATCH_END |
    """

    def __init__(self, log_interval: int, ledger: Ledger, plan: PhasePlan) -> None:
        """ledger: comes before this callback."""
        self.log_interval, self.ledger, self.plan = log_interval, ledger, plan
        self.window: Window | None = None
        """Of the step that has just ended; None where no line is due."""
        self.train_seconds = 0.0
        """Of the whole run, without evaluation and saving."""
        self._seconds = self._wait = 0.0
        self._tokens = self._real_tokens = 0  # of the run, at the window's start
        self._mark = self._asked = time.monotonic()

    def fit_start(self, state: State, logger: Logger) -> None:
        self._seconds = self._wait = 0.0  # after a rollback: of steps that were given up
        self._real_tokens = sum(self.ledger.real_tokens().values())
        self._tokens = self.plan.tokens_before(state.timestamp.batch.value)
        self.restart()

    def restart(self) -> None:
        """Count time from here on: what came before (evaluation, saving) is no training time."""
        self._mark = time.monotonic()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._asked = time.monotonic()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._wait += time.monotonic() - self._asked

    def batch_end(self, state: State, logger: Logger) -> None:
        now = time.monotonic()
        self._seconds += now - self._mark
        self.train_seconds += now - self._mark
        self._mark = now
        self.window = None
        step = state.timestamp.batch.value
        if step % self.log_interval:
            return
        tokens, real_tokens = self.plan.tokens_before(step), sum(self.ledger.real_tokens().values())
        self.window = Window(
            step=step,
            tokens=tokens,
            all_real_tokens=real_tokens,
            slots=tokens - self._tokens,
            real_tokens=real_tokens - self._real_tokens,
            seconds=self._seconds,
            wait_seconds=self._wait,
        )
        self._tokens, self._real_tokens, self._seconds, self._wait = tokens, real_tokens, 0.0, 0.0
