"""Our callbacks as one, and events without what Composer does for algorithms, profilers and debug lines.

Composer spends some 10 us on each callback of its own at each of a step's 13 events, nearly all of which are nothing to
it, and 100 us on an event: with fifteen callbacks two hundredths of a short step on a CPU.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from composer import Trainer
from composer.core import Callback, Event, State
from composer.loggers import Logger, LoggerDestination


class Together(Callback):
    """Runs callbacks in order, each at the events that it has something to do at."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = list(callbacks)
        self._methods: dict[Event, list[Callable[[State, Logger], Any]]] = {
            event: [
                getattr(callback, event.value)
                for callback in self.callbacks
                if getattr(type(callback), event.value) is not getattr(Callback, event.value)
            ]
            for event in Event
        }

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        for method in self._methods[event]:
            method(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        with ExitStack() as stack:  # each, whatever the others raise
            for callback in reversed(self.callbacks):
                stack.callback(callback.close, state, logger)

    def post_close(self) -> None:
        with ExitStack() as stack:
            for callback in reversed(self.callbacks):
                stack.callback(callback.post_close)


def without_ceremony(trainer: Trainer) -> Trainer:
    """The trainer, whose events run its callbacks and then its loggers, and nothing else, and which logs nothing of its
    own: a loss and nine clocks a step. What callbacks are given to log by is `trainer.engine.logger`. It must have
    neither algorithms nor a profiler."""
    state, logger = trainer.state, trainer.logger
    trainer.logger = Logger(state, [])
    assert not state.algorithms
    assert state.profiler is None

    def run_event(event: Event | str) -> dict[str, Any]:
        event = Event(event)
        loggers = []
        for callback in state.callbacks:
            if isinstance(callback, LoggerDestination):
                loggers.append(callback)
            else:
                callback.run_event(event, state, logger)
        for destination in loggers:
            destination.run_event(event, state, logger)
        return {}  # traces of algorithms

    trainer.engine.run_event = run_event  # pyright: ignore[reportAttributeAccessIssue]
    return trainer
