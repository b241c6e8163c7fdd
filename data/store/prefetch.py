"""Fetching shards ahead of their use, in a few threads of a process."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

THREADS = 4
_MAX_WAITING = 4096
_UNCLAIMED_SECONDS = 600.0  # after that a shard that was announced and not opened gives its room to others


@dataclass(eq=False)
class Job:
    """A shard to fetch. fetch: gives a descriptor of it, or None where there is nothing (more) to do."""

    name: str
    bytes: int
    fetch: Callable[[], int | None]
    awaited: bool = False
    handle: int | None = None
    error: Exception | None = None
    done: float = field(default=0.0)


class Prefetcher:
    """Runs jobs in the order announced. What was fetched and not yet taken stays open, and so in the cache; together
    with what is on its way it is at most `budget` bytes, or one job. The threads end with the process."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._changed = threading.Condition()
        self._waiting: dict[str, Job] = {}
        self._held: dict[str, Job] = {}  # on their way, or fetched and not taken
        self._threads = 0

    def announce(self, jobs: Sequence[Job]) -> None:
        """These will be taken soon, in this order. Returns at once."""
        with self._changed:
            for job in jobs:
                if len(self._waiting) < _MAX_WAITING and job.name not in self._held:
                    self._waiting.setdefault(job.name, job)
            while self._threads < min(THREADS, len(self._waiting)):
                self._threads += 1
                threading.Thread(target=self._work, name=f"prefetch-{self._threads}", daemon=True).start()
            self._changed.notify_all()

    def take(self, name: str) -> int | None:
        """The job's descriptor, now the caller's, if it was fetched or is on its way; else None, and it will not be.

        Raises what the job raises while it is waited for; a job that failed before is forgotten: the caller tries anew.
        """
        with self._changed:
            self._waiting.pop(name, None)
            job = self._held.get(name)
            if job is None:
                return None
            job.awaited = True
            while not job.done:
                self._changed.wait()
            self._held.pop(name, None)
            self._changed.notify_all()
        if job.error is not None:
            raise job.error
        return job.handle

    def close_unlinked(self) -> None:
        """Give up what was fetched, waits to be taken, and was evicted meanwhile: it takes room while it is open."""
        with self._changed:
            for job in list(self._held.values()):
                if job.handle is not None and job.done and not job.awaited and os.fstat(job.handle).st_nlink == 0:
                    del self._held[job.name]
                    os.close(job.handle)
            self._changed.notify_all()

    def close_inherited(self) -> None:
        """In a fork: close its copies of what was fetched. It is not used there any more."""
        for job in self._held.values():
            if job.handle is not None and job.done:
                os.close(job.handle)
        self._held.clear()

    def _work(self) -> None:
        while True:
            with self._changed:
                while (job := self._next()) is None:
                    self._changed.wait(_UNCLAIMED_SECONDS if self._waiting else None)
                del self._waiting[job.name]
                self._held[job.name] = job
            try:
                job.handle = job.fetch()
            except Exception as error:  # whoever waits for it gets it
                job.error = error
            with self._changed:
                job.done = time.monotonic()
                if job.handle is None and not job.awaited:
                    del self._held[job.name]
                self._changed.notify_all()

    def _next(self) -> Job | None:
        job = next(iter(self._waiting.values()), None)
        if job is None:
            return None
        now = time.monotonic()
        while self._held and sum(held.bytes for held in self._held.values()) + job.bytes > self.budget:
            oldest = next(iter(self._held.values()))
            if oldest.handle is None or oldest.awaited or now - oldest.done < _UNCLAIMED_SECONDS:
                return None
            del self._held[oldest.name]
            os.close(oldest.handle)
        return job
