"""The progress line: tokens, tokens/s, loss, lr, ETA. A live bar on a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Callable
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from callbacks.guards import step_loss

_SECONDS_BETWEEN_LINES = 15.0
_SMOOTHING_STEPS = 50


class ProgressLine(Callback):
    """Rank 0 only. Logs nothing.

    loss: mean over the last 50 steps or so. tokens/s: slots, evaluations and saves included. Gradient norm, MFU,
    share of time waiting for data, memory and cost: of the newest line of metrics.jsonl.
    """

    def __init__(
        self,
        console: Console,
        total_tokens: int,
        describe: Callable[[int], dict[str, Any]],
        latest: Callable[[], dict[str, Any]],
    ) -> None:
        """latest: the newest line of metrics.jsonl by this process, or nothing yet."""
        self.console, self.total_tokens, self.describe, self.latest = console, total_tokens, describe, latest
        self._progress: Progress | None = None
        self._loss = 0.0
        self._steps = 0
        self._start, self._first_tokens, self._last_line = 0.0, 0, 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        self._start = self._last_line = time.monotonic()
        self._first_tokens = self.describe(state.timestamp.batch.value)["tokens"]
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.fields[phase]}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%  {task.fields[text]}  ETA"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._progress.add_task("train", total=self.total_tokens, completed=self._first_tokens, phase="", text="")
            self._progress.start()

    def batch_end(self, state: State, logger: Logger) -> None:
        loss = step_loss(state)
        if loss is not None:
            self._steps = min(self._steps + 1, _SMOOTHING_STEPS)
            self._loss += (loss - self._loss) / self._steps
        step = state.timestamp.batch.value
        facts = self.describe(step)
        tokens, now = facts["tokens"], time.monotonic()
        speed = (tokens - self._first_tokens) / (now - self._start)
        lr = state.optimizers[0].param_groups[0]["lr"]
        done = f"{_short(tokens)}/{_short(self.total_tokens)} tokens"
        text = f"{done}  {_short(speed)} tokens/s  loss {self._loss:.3f}  lr {lr:.1e}{_extras(self.latest())}"
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=tokens, phase=facts["phase"], text=text)
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES or tokens == self.total_tokens:
            self._last_line = now
            eta = (self.total_tokens - tokens) / speed
            self.console.print(
                f"{facts['phase']:<10} step {step}  {text}  ETA {eta // 60:.0f}:{eta % 60:02.0f}",
                highlight=False,
                soft_wrap=True,
            )

    def fit_end(self, state: State, logger: Logger) -> None:
        self.close(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _extras(line: dict[str, Any]) -> str:
    """What is worth a look of a line of metrics.jsonl."""
    memory = line.get("cuda_peak_bytes", line.get("host_memory_bytes"))
    parts = [
        ("grad_norm", lambda value: f"grad {value:.2f}"),
        ("mfu", lambda value: f"MFU {value:.1%}"),
        ("data_wait", lambda value: f"wait {value:.0%}"),
    ]
    texts = [show(line[key]) for key, show in parts if line.get(key) is not None]
    texts += [f"{memory / 2**30:.1f} GiB"] if memory is not None else []
    texts += [f"cost {line['cost']:,.2f} of {line['cost_to_end']:,.2f}"] if "cost" in line else []
    return "".join(f"  {text}" for text in texts)


def _short(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"
