"""Counts tokens and time, and writes metrics to metrics.jsonl and Composer's loggers (TensorBoard, wandb)."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from callbacks.gauge import Gauge, Window
from callbacks.guards import StepGuard, predicted_loss
from callbacks.ledger import Ledger
from callbacks.lines import append_line, flat, step_of, trim_lines


class MetricsLog(Callback):
    """One line per interval; numbers of a step do not depend on world size, nor (but for times) on restarts.

    | logged | unit | event, interval |
    |---|---|---|
    | loss | nats per masked token, mean over applied steps since the last line, or null | BATCH_END, log_interval |
    | bad_steps | steps of the run not applied because loss or gradient was not finite | same |
    | lr, phase, max_seq_len, global_batch_size | - , name, slots, rows | same |
    | tokens, real_tokens | slots; tokens that are no padding | same |
    | data_wait | share of the time without evaluation and saving that the loader is waited for, rank 0 | same |
    | what each gauge says | see there | same |
    | validation, validation_ema | see evaluation; of the averaged weights | when evaluated |
    """

    def __init__(
        self,
        file: Path,
        log_interval: int,
        ledger: Ledger,
        guard: StepGuard,
        describe: Callable[[int], dict[str, Any]],
        gauges: Sequence[Gauge] = (),
    ) -> None:
        """describe: schedule facts of a step (phase, tokens, max_seq_len, global_batch_size).
        gauges: callbacks that come before this one."""
        self.file, self.log_interval, self.describe = file, log_interval, describe
        self.ledger, self.guard, self.gauges = ledger, guard, gauges
        self.latest: dict[str, Any] = {}
        self.train_seconds = 0.0
        self._window = {"loss": 0.0, "steps": 0}
        self._window_tokens, self._window_seconds, self._window_wait = 0, 0.0, 0.0
        self._window_start = 0  # slots of the run at its first step
        self._mark = time.monotonic()

    def trim(self, step: int) -> None:
        """Drop the lines of steps that a restart will repeat (rank 0)."""
        trim_lines(self.file, step)

    def fit_start(self, state: State, logger: Logger) -> None:
        self._window_tokens = sum(self.ledger.real_tokens().values())
        self._window_start = self.describe(state.timestamp.batch.value)["tokens"]
        self.start_clock()

    def start_clock(self) -> None:
        """Begin to count time here: what came before (evaluation, saving) is no training time."""
        self._mark = time.monotonic()

    def batch_start(self, state: State, logger: Logger) -> None:
        self._window_wait += time.monotonic() - self._mark

    def batch_end(self, state: State, logger: Logger) -> None:
        now = time.monotonic()
        self._window_seconds += now - self._mark
        self.train_seconds += now - self._mark
        self._mark = now
        loss = predicted_loss(state)
        if loss is not None:
            self._window["loss"] += loss
            self._window["steps"] += 1
        step = state.timestamp.batch.value
        if step % self.log_interval == 0:
            self._write_line(step, state, logger)

    def state_dict(self) -> dict[str, Any]:
        """JSON values for the checkpoint. A collective."""
        return {
            "train_seconds": self.train_seconds,
            "window": dict(self._window),
            "gauges": {type(gauge).__name__: gauge.state_dict() for gauge in self.gauges},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.train_seconds = state["train_seconds"]
        self._window = dict(state["window"])
        for gauge in self.gauges:
            gauge.load_state_dict(state["gauges"].get(type(gauge).__name__, {}))

    def _write_line(self, step: int, state: State, logger: Logger) -> None:
        real_tokens, facts = sum(self.ledger.real_tokens().values()), self.describe(step)
        slots, tokens = facts["tokens"] - self._window_start, real_tokens - self._window_tokens
        window = Window(step, facts["tokens"], slots, tokens, self._window_seconds)
        line = {
            "step": step,
            **facts,
            "loss": self._window["loss"] / self._window["steps"] if self._window["steps"] else None,
            "lr": state.optimizers[0].param_groups[0]["lr"],
            "real_tokens": real_tokens,
            "data_wait": self._window_wait / self._window_seconds,
            "bad_steps": self.guard.bad_steps,
        }
        for gauge in self.gauges:
            line |= gauge.read(window)
        self._window = {"loss": 0.0, "steps": 0}
        self._window_tokens, self._window_seconds, self._window_wait = real_tokens, 0.0, 0.0
        self._window_start = facts["tokens"]
        self.latest = line
        self.append(line)
        logger.log_metrics(flat(line, "train"))

    def evaluation_at(self, step: int, key: str = "validation") -> dict[str, Any] | None:
        """The evaluation after `step` steps, from metrics.jsonl: also one made before a restart (rank 0)."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        found = [json.loads(line) for line in lines if step_of(line) == step]
        return next((line[key] for line in found if key in line), None)

    def append(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl (rank 0)."""
        if dist.get_global_rank() == 0:
            append_line(self.file, line)
