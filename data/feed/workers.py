"""The loader's worker processes: how they start, stop, and die without hanging or confusing the training process."""

import mmap
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import ForkContext
from typing import Any

import torch
from torch.utils.data import IterableDataset

from flexbert_core.schema import ConfigError, RunError


class Guarded(IterableDataset):
    """Lists of so many batches, the last one perhaps shorter: what a worker's message costs does not depend on its
    size. An error of ours goes to the training process as a value behind the batches before it: a DataLoader would wrap
    its message in a traceback."""

    def __init__(self, source: Callable[[], Iterator[Any]], group: int) -> None:
        self.source, self.group = source, group

    def __iter__(self) -> Iterator[list[Any]]:
        batches: list[Any] = []
        try:
            for batch in self.source():
                batches.append(batch)
                if len(batches) == self.group:
                    yield batches
                    batches = []
        except (RunError, ConfigError) as error:
            batches.append(error)
        if batches:
            yield batches


def with_plain_deaths(groups: Iterator[list[Any]]) -> Iterator[Any]:
    """The batches, one by one; a worker that was killed ends them with a RunError.

    The workers end with them: the traceback of an error keeps the DataLoader's iterator, which would end its workers
    when it is forgotten, and a process waits for its workers before it exits.
    """
    with _watched([worker.sentinel for worker in getattr(groups, "_workers", [])]):
        try:
            for group in groups:
                yield from group
        except RuntimeError as error:
            raise worker_death(error) or error from None
        finally:
            getattr(groups, "_shutdown_workers", lambda: None)()


class Event:
    """What PyTorch ends its workers with, without a lock: they look at it all the time, and one that is killed while
    it holds the lock of a multiprocessing.Event leaves all others, and the training process, waiting for ever."""

    def __init__(self) -> None:
        self._flag = mmap.mmap(-1, 1)  # shared by forks, without a file

    def set(self) -> None:
        self._flag[0] = 1

    def is_set(self) -> bool:
        return self._flag[0] == 1


class Fork(ForkContext):
    def Event(self) -> Any:
        return Event()


@contextmanager
def _watched(sentinels: list[int]) -> Iterator[None]:
    """While a worker is dead, remind the main thread of it every second.

    PyTorch reports a death in its handler of SIGCHLD, which ends whatever the main thread waits for. But a signal that
    comes just before a read begins does not end that read, and of a worker killed in the middle of a message the read
    would wait for the rest for ever.
    """
    done, (end, close) = threading.Event(), os.pipe()

    def watch() -> None:
        wait([*sentinels, end])
        while not done.wait(1.0):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGCHLD)

    thread = threading.Thread(target=watch, name="loader-watch", daemon=True)
    if sentinels:
        thread.start()
    try:
        yield
    finally:
        done.set()
        os.write(close, b"1")  # closing would not do: processes forked meanwhile have it open, too
        if sentinels:
            thread.join()
        os.close(close)
        os.close(end)


def worker_death(error: RuntimeError) -> RunError | None:
    """What to say when PyTorch reports, wherever the training process stands, that a loader worker is gone."""
    if not str(error).startswith("DataLoader worker"):
        return None
    return RunError(f"a {str(error).splitlines()[0].rstrip('.')}: if it was the kernel, for want of memory: {_LESS}")


_LESS = "lower data.num_workers or data.prefetch_batches; the same command goes on from the newest checkpoint"


_SECONDS_AFTER_SIGTERM = 300


def prepare_worker(_worker: int) -> None:
    """One thread, and none of the trainer's signal handlers: the training process ends its workers itself.

    A scheduler sends SIGTERM and the like to all processes of a job; a worker that obeyed would take the run's last
    step and checkpoint with it. So SIGTERM kills it only after a while, if it is still there then.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda _number, _frame: signal.alarm(_SECONDS_AFTER_SIGTERM))
