"""Run a datatrove pipeline on this machine: quietly, with a progress bar, and with no process left behind."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from schema import RunError

_LINE_SECONDS = 5.0
_GRACE_SECONDS = 5.0


def warm_up() -> None:
    """Start the process that workers are forked from, so that it imports the heavy libraries while others work."""
    from multiprocess import forkserver

    forkserver.set_forkserver_preload(["data.pipeline", "streaming"])
    forkserver.ensure_running()
    os.register_at_fork(after_in_child=die_with_parent)  # datatrove's manager process is a plain fork


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent ends, however that ends (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG


def run_pipeline(title: str, steps: list[PipelineStep], work: Path, name: str, sizes: list[int], workers: int) -> None:
    """Run the steps once for each task that is not done yet.

    Args:
        name: of this pipeline; its logs and completion marks go to WORK/logs/NAME.
        sizes: bytes of each task, for the progress bar.
        workers: processes; with fewer tasks than that, each task's tokenizer gets several threads.
    Raises:
        RunError: from a task, or when a worker process died.
    """
    processes = max(1, min(workers, len(sizes)))
    executor = _Executor(steps, len(sizes), processes, str(work / "logs" / name))
    executor.threads = max(1, workers // processes)
    todo = executor.get_incomplete_ranks()
    if not todo:
        return
    progress = np.zeros((len(sizes), 2), np.int64)
    progress[:, 0] = sizes
    progress[todo, 0] = 0
    np.save(work / "progress.npy", progress)
    stderr = sys.stderr
    with (work / "prepare.log").open("a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
        logger.remove()
        logger.add(log)
        try:
            with _Monitor(title, work, sum(sizes), stderr) as monitor:
                executor.run()
        except BaseException:
            if monitor.dead:
                raise RunError(
                    f"{title}: worker process {monitor.dead} was killed (out of memory?): run the same command "
                    "again to go on, with fewer workers if it was memory"
                ) from None
            raise
        finally:
            logger.remove()


class _Executor(LocalPipelineExecutor):
    threads: int = 1
    main: int

    def __init__(self, steps: list[PipelineStep], tasks: int, workers: int, logging_dir: str) -> None:
        super().__init__(list(steps), tasks=tasks, workers=workers, logging_dir=logging_dir)
        self.main = os.getpid()

    def _launch_run_for_rank(self, rank: int, ranks_q: Any, completed: Any = None, completed_lock: Any = None) -> Any:
        if os.getpid() != self.main:
            die_with_parent()
            sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (datatrove logs there; for life)
            os.environ["RAYON_NUM_THREADS"] = str(self.threads)
        with _environment("TOKENIZERS_PARALLELISM", "true" if self.threads > 1 else "false"):
            return super()._launch_run_for_rank(rank, ranks_q, completed, completed_lock)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


class _Monitor:
    """A thread that shows WORK/progress.npy, and interrupts the main thread when a worker process is gone.

    multiprocessing's Pool waits for ever for the task of a worker that was killed.
    """

    def __init__(self, title: str, work: Path, total: int, stderr: TextIO) -> None:
        self.dead = 0
        self._title, self._total = title, total
        self._lines = np.load(work / "progress.npy", mmap_mode="r")
        self._console = Console(file=stderr)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "_Monitor":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        show = self._bar if self._console.is_terminal else self._print
        show()

    def _bar(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(self._title, total=self._total, completed=self._done())
            while not self._stop.wait(0.2):
                bar.update(task, completed=self._done())
                self._look_for_dead()

    def _print(self) -> None:
        start, first = time.monotonic(), self._done()
        printed = start
        while not self._stop.wait(0.2):
            self._look_for_dead()
            now, done = time.monotonic(), self._done()
            if now - printed >= _LINE_SECONDS:
                printed = now
                rate = (done - first) / (now - start)
                left = f"{(self._total - done) / rate:.0f} s left" if rate > 0 else "starting"
                line = f"{self._title}: {done / 1e6:.1f} of {self._total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s, {left}"
                self._console.print(line, highlight=False, soft_wrap=True)

    def _done(self) -> int:
        return int(self._lines[:, 0].sum())

    def _look_for_dead(self) -> None:
        for pid in map(int, np.unique(self._lines[:, 1])):
            if pid == 0 or self.dead:
                continue
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                # Workers also end when a task has failed or the user has interrupted; but then the run is about to end.
                if not self._stop.wait(_GRACE_SECONDS) and pid in self._lines[:, 1]:
                    self.dead = pid
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return
