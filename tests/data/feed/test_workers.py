"""What loader workers share."""

import os
import signal
import time

import pytest

from data.feed.workers import Event


@pytest.mark.slow
def test_who_is_killed_holds_no_lock_of_the_event_that_ends_workers() -> None:
    """A multiprocessing.Event fails this within a few kills."""
    event = Event()
    for _ in range(50):
        pid = os.fork()
        if pid == 0:
            while not event.is_set():
                pass
            os._exit(0)
        time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        signal.alarm(20)
        assert not event.is_set()
        signal.alarm(0)
    pid = os.fork()
    if pid == 0:
        event.set()
        os._exit(0)
    os.waitpid(pid, 0)
    assert event.is_set()
