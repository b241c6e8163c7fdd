"""The progress line: tokens, tokens/s, loss, lr, ETA and what a line of metrics.jsonl says, wrapped to the console's
width. Live under a bar on a terminal, printed now and then elsewhere.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from callbacks.guards import predicted_loss
from callbacks.metrics_file import MetricsFile
from callbacks.step_log import shown
from recipe.phases import PhasePlan

SECONDS_BETWEEN_LINES = 15.0
_SMOOTHING_STEPS = 50
_INDENT = " " * 11  # of lines that belong to the one above: a phase's name and a space


class ProgressLine(Callback):
    """Rank 0 only. Logs nothing.

    loss: mean over the last 50 steps or so. ETA: at the pace so far, evaluations and saves included. tokens/s, masked
    accuracy, gradient norm, update-to-weight ratio, MFU, share of time waiting for data, memory, cost, losses of the
    streams: those of the newest line of metrics.jsonl. Below them, what other callbacks log.
    """

    def __init__(
        self,
        console: Console,
        plan: PhasePlan,
        metrics: MetricsFile,
    ) -> None:
        self.console, self.plan, self.metrics = console, plan, metrics
        self._progress: _Bar | None = None
        self._loss = 0.0
        self._steps = 0
        self._start, self._first_tokens, self._last_line = 0.0, 0, 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        self._start = self._last_line = time.monotonic()
        self._first_tokens = self.plan.tokens_before(state.timestamp.batch.value)
        if self.console.is_terminal:
            self._progress = _Bar(
                TextColumn("{task.fields[phase]}", markup=False),
                BarColumn(bar_width=None),  # what the others leave of the line
                TextColumn("{task.percentage:>3.0f}%  {task.fields[text]}  ETA", markup=False),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
                expand=True,
            )
            self._progress.add_task(
                "train", total=self.plan.total_tokens, completed=self._first_tokens, phase="", text=""
            )
            self._progress.start()

    def batch_end(self, state: State, logger: Logger) -> None:
        loss = predicted_loss(state)
        if loss is not None:
            self._steps = min(self._steps + 1, _SMOOTHING_STEPS)
            self._loss += (loss - self._loss) / self._steps
        step = state.timestamp.batch.value
        facts = self.plan.facts(step)
        tokens, now = facts["tokens"], time.monotonic()
        speed = (tokens - self._first_tokens) / (now - self._start)
        lr, latest = self.plan.lr(step - 1), self.metrics.latest
        done = [f"{_short(tokens)}/{_short(self.plan.total_tokens)} tokens"]
        if "tokens_per_second" in latest:
            done.append(f"{_short(latest['tokens_per_second'])} tokens/s")
        scores = _scores(self._loss if self._steps else None, lr, latest)
        if self._progress is not None:
            self._progress.below = [scores, stream_losses(latest), self._others()]
            text = "  ".join(done)
            self._progress.update(self._progress.task_ids[0], completed=tokens, phase=facts["phase"], text=text)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES or tokens == self.plan.total_tokens:
            self._last_line = now
            eta = (self.plan.total_tokens - tokens) / speed
            first = [f"{facts['phase']:<10} step {step}", *done, f"ETA {eta // 60:.0f}:{eta % 60:02.0f}", *scores]
            lines = wrapped(first, self.console.width)
            for parts in (stream_losses(latest), self._others()):
                lines += _indented(parts, self.console.width)
            self.console.print("\n".join(lines), soft_wrap=True)

    def _others(self) -> list[str]:
        """What callbacks of the user's log; evaluation has lines of its own."""
        return [f"{name} {value:.4g}" for name, value in self.metrics.others.items()]

    def fit_end(self, state: State, logger: Logger) -> None:
        self.close(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class _Bar(Progress):
    """A bar with lines below it. below: the parts of each."""

    below: Iterable[list[str]] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for parts in self.below:
            yield from (Text(line, no_wrap=True) for line in _indented(parts, self.console.width))


def _scores(loss: float | None, lr: float, line: dict[str, Any]) -> list[str]:
    """What is worth a look of the run so far and of a line of metrics.jsonl; what matters most comes first."""
    memory = line.get("cuda_peak_bytes", line.get("host_memory_bytes"))
    figures: list[tuple[str, Callable[[float], str]]] = [
        ("masked_accuracy", lambda value: f"accuracy {value:.1%}"),
        ("grad_norm", lambda value: f"grad {value:.2f}"),
        ("update_ratio", lambda value: f"update {value:.1e}"),
        ("mfu", lambda value: f"MFU {value:.1%}"),
        ("data_wait", lambda value: f"wait {value:.0%}"),
    ]
    texts = [show(line[key]) for key, show in figures if line.get(key) is not None]
    texts += [f"memory {memory / 2**30:.1f} GiB"] if memory is not None else []
    texts += [f"cost {line['cost']:,.2f} of {line['cost_to_end']:,.2f}"] if "cost" in line else []
    return [f"loss {shown(loss, '.3f')}", f"lr {lr:.1e}", *texts]


def stream_losses(line: dict[str, Any]) -> list[str]:
    """The loss of each stream in the steps of a line of metrics.jsonl; of one alone it is the loss."""
    scores = line.get("streams", {}).items()
    losses = [f"{name} {each['loss']:.3f}" for name, each in scores if each["loss"] is not None]
    return [f"loss by stream, to step {line['step']}:", *losses] if len(losses) > 1 else []


def wrapped(parts: list[str], width: int) -> list[str]:
    """Lines of whole parts, those after the first indented; a part that is wider alone has its own."""
    lines = parts[:1]
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(_INDENT + part)
    return lines


def _indented(parts: list[str], width: int) -> list[str]:
    return wrapped([_INDENT + parts[0], *parts[1:]], width) if parts else []


def _short(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"
