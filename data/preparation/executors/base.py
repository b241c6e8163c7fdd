"""What an executor is: it runs a datatrove pipeline once for each task that is not done yet, and waits for it."""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from flexbert_core.schema import Registry, RunError, plain_console

EXECUTORS = Registry("executor", has_imports=False)

ROOT = Path(__file__).parents[3]
"""Where `data` can be imported from: processes on other machines start elsewhere."""

_LINE_SECONDS = 5.0


@dataclass(frozen=True)
class Stage:
    """One parallel step of the work."""

    title: str
    """For the progress display, such as `reading`."""
    name: str
    """Logs, completion marks and failures go to WORK/logs/NAME."""
    steps: Sequence[PipelineStep]
    sizes: Sequence[int]
    """Bytes of each task."""
    work: Path

    @property
    def logs(self) -> Path:
        return self.work / "logs" / self.name

    def unfinished(self) -> list[int]:
        """Tasks that are not done, ascending."""
        done = self.logs / "completions"
        marks = {file.name for file in done.iterdir()} if done.is_dir() else set()
        return [rank for rank in range(len(self.sizes)) if f"{rank:05d}" not in marks]

    def done_bytes(self) -> int:
        """Bytes of the tasks that are done."""
        return sum(self.sizes) - sum(self.sizes[rank] for rank in self.unfinished())

    def failure(self) -> str | None:
        """What an unfinished task said when it last failed, of the first such task."""
        for rank in self.unfinished():
            file = self.logs / "failures" / f"{rank:05d}"
            if file.exists():
                return file.read_text(encoding="utf-8")
        return None


class Executor:
    """Base of an executor."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def check(self) -> None:
        """Raises ConfigError when this executor cannot work here: a program or package is missing."""

    def start(self) -> None:
        """Called once, early: whatever can be got ready while the sources are listed."""

    def run(self, stage: Stage) -> None:
        """Do the tasks that are not done. Raises RunError when one failed; the others may be done or not."""
        raise NotImplementedError

    def stop(self) -> None:
        """Called once, after the last stage or a failure."""


class RecordsFailures(PipelineExecutor):
    """A task that fails leaves a line in LOGS/failures/NNNNN: other machines' exceptions do not get here else."""

    folder: str | None = None
    """The command's own, where a process of the cluster starts elsewhere: paths of the config may be relative to it."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        failures = Path(str(self.logging_dir.resolve_paths("failures")))
        try:
            (failures / f"{rank:05d}").unlink(missing_ok=True)
            if self.folder is not None:
                os.chdir(self.folder)
            return super()._run_for_rank(rank, local_rank, node_rank)
        except Exception as error:
            failures.mkdir(parents=True, exist_ok=True)
            (failures / f"{rank:05d}").write_text(one_line(error), encoding="utf-8")
            raise


def one_line(error: BaseException) -> str:
    """An exception as one line: our own errors say it all, a bug says where it is."""
    if isinstance(error, RunError):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})".replace("\n", " ")


@contextlib.contextmanager
def quiet(work: Path) -> Iterator[TextIO]:
    """Send what datatrove logs to WORK/prepare.log; gives the real stderr."""
    from loguru import logger

    stderr = sys.stderr
    with (work / "prepare.log").open("a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        logger.remove()
        logger.add(log)
        try:
            yield stderr
        finally:
            logger.remove()


@contextlib.contextmanager
def display(title: str, total: int, done: Callable[[], int], stderr: TextIO, interval: float = 0.2) -> Iterator[None]:
    """Show progress in bytes while the block runs: a bar on a terminal, else a line now and then."""
    stop, console = threading.Event(), plain_console(file=stderr)
    show = _bar if console.is_terminal else _print
    thread = threading.Thread(target=show, args=(title, total, done, console, stop, interval), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _bar(
    title: str, total: int, done: Callable[[], int], console: Console, stop: threading.Event, interval: float
) -> None:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total, completed=done())
        while not stop.wait(interval):
            bar.update(task, completed=done())


def _print(
    title: str, total: int, done: Callable[[], int], console: Console, stop: threading.Event, interval: float
) -> None:
    start, first = time.monotonic(), done()
    printed = start
    while not stop.wait(interval):
        now = time.monotonic()
        if now - printed < _LINE_SECONDS:
            continue
        bytes_done, printed = done(), now
        rate = (bytes_done - first) / (now - start)
        left = f"{(total - bytes_done) / rate:.0f} s left" if rate > 0 else "starting"
        line = f"{title}: {bytes_done / 1e6:.1f} of {total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s, {left}"
        console.print(line, soft_wrap=True)
