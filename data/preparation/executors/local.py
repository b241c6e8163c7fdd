"""Processes of this machine: none is left behind, and none that dies goes unnoticed."""

import contextlib
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from copy import deepcopy
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datatrove.executor.local import LocalPipelineExecutor
from pydantic import Field

from data.preparation.executors.base import EXECUTORS, Executor, Stage, display, one_line, quiet
from flexbert_core.schema import Component, RunError


@EXECUTORS.register("local")
class Local(Executor):
    """Worker processes of this machine, one task each at a time."""

    class Config(Component):
        name: Literal["local"] = "local"
        workers: int | None = Field(None, ge=1)
        """Processes; default: the cores this process may use. The result does not depend on it."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.workers: int = config.workers or len(os.sched_getaffinity(0))

    def start(self) -> None:
        """Start the process that workers are forked from, so that it imports the heavy libraries while others work.

        Must be reached from under `if __name__ == "__main__"`: that process imports the main module.
        """
        if self.workers > 1:
            from multiprocess import forkserver

            os.environ["FLEXBERT_PREPARE_PID"] = str(os.getpid())  # for data.preload
            forkserver.set_forkserver_preload(["data.preparation.preload", "data.preparation.writing", "streaming"])
            forkserver.ensure_running()
            del os.environ["FLEXBERT_PREPARE_PID"]  # it says nothing to processes that come later

    def run(self, stage: Stage) -> None:
        """Raises RunError from a task, or when a worker process died. With few tasks, each has several threads."""
        todo = stage.unfinished()
        if not todo:
            return
        processes = max(1, min(self.workers, len(todo)))
        progress = np.zeros((len(stage.sizes), 2), np.int64)
        progress[:, 0] = stage.sizes
        progress[todo, 0] = 0
        np.save(stage.work / "progress.npy", progress)
        lines = np.load(stage.work / "progress.npy", mmap_mode="r+")
        executor = LocalPipelineExecutor(
            list(stage.steps), tasks=len(stage.sizes), workers=processes, logging_dir=str(stage.logs)
        )
        threads = max(1, self.workers // processes)
        with (
            quiet(stage.work) as stderr,
            display(stage.title, sum(stage.sizes), lambda: int(lines[:, 0].sum()), stderr),
        ):
            if processes == 1:
                with _tokenizer_threads(threads):
                    _run_tasks(executor, todo, lines)
            else:
                _Workers(stage, executor, processes, threads).run(todo)


def _run_tasks(executor: LocalPipelineExecutor, ranks: list[int], lines: Any) -> None:
    pipeline = executor.pipeline
    for rank in ranks:
        executor.pipeline = deepcopy(pipeline)
        lines[rank, 1] = os.getpid()
        executor._run_for_rank(rank)
        lines[rank] = lines[rank, 0], 0
        executor.pipeline = pipeline


@contextlib.contextmanager
def _tokenizer_threads(threads: int) -> Iterator[None]:
    """How many threads the tokenizers that are used first inside the block run on."""
    wanted = {"TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false", "RAYON_NUM_THREADS": str(threads)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class _Workers:
    """Processes that each take one task after the other.

    datatrove uses multiprocessing's Pool, which waits for ever when a worker is killed while it holds the queue's lock.
    """

    def __init__(self, stage: Stage, executor: LocalPipelineExecutor, processes: int, threads: int) -> None:
        from multiprocess.context import ForkServerContext

        context = ForkServerContext()
        self.title, self.connections, self.processes = stage.title, [], []
        for _ in range(processes):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(executor, stage.work, threads, there), daemon=True)
            self.processes.append(process)
            self.connections.append(here)
            process.start()
            there.close()

    def run(self, todo: list[int]) -> None:
        """Raises RunError for the first task that fails or worker that dies, after all workers have ended."""
        left, busy = deque(todo), {}
        try:
            for connection, process in zip(self.connections, self.processes, strict=True):
                self._give(connection, process, left, busy)
            while busy:
                for connection in wait(list(busy)):
                    process = busy.pop(connection)
                    self._take(connection, process)
                    self._give(connection, process, left, busy)
        finally:
            for process in self.processes:
                process.kill()
                process.join()
            for connection in self.connections:
                connection.close()

    def _give(self, connection: Any, process: Any, left: deque[int], busy: dict[Any, Any]) -> None:
        if left:
            busy[connection] = process
            try:
                connection.send(left.popleft())
            except OSError:
                raise self._dead(process) from None

    def _take(self, connection: Any, process: Any) -> None:
        try:
            fault = connection.recv()
        except (EOFError, OSError):
            raise self._dead(process) from None
        if fault is not None:
            raise RunError(fault)

    def _dead(self, process: Any) -> RunError:
        return RunError(
            f"{self.title}: worker process {process.pid} was killed (out of memory?): run the same command "
            "again to go on, with fewer workers if it was memory"
        )


def _work(executor: LocalPipelineExecutor, work: Path, threads: int, connection: Any) -> None:
    """Life of a worker process: ranks come in, None goes out for each that is done, or a line saying what failed."""
    from multiprocess.process import parent_process

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one ends the others
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (datatrove logs there; for life)
    lines = np.load(work / "progress.npy", mmap_mode="r+")
    with _tokenizer_threads(threads), contextlib.suppress(EOFError):
        while True:
            rank = connection.recv()
            try:
                _run_tasks(executor, [rank], lines)
            except Exception as error:
                connection.send(one_line(error))
            else:
                connection.send(None)


def _end_with(process: Any) -> None:
    process.join()
    os._exit(1)
