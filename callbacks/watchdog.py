"""Ends a run in which a rank hangs, with the stacks of every rank; nothing waits for ever."""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from typing import Self

import psutil
from composer.core import Callback, State
from composer.loggers import Logger

from ranks import of_all_ranks

_LAST_WORDS = 5.0  # seconds that the other ranks have to print their stacks before this one's end brings them down
_BLOCKED = 60.0  # seconds after which the interpreter itself counts as hung


class Watchdog(Callback):
    """Exit code 1 when no step begins or ends for `timeout` seconds: evaluations, saves and exports included.

    One rank that hangs stops all, so all time out together, and each prints its own stacks. A rank that was stopped
    (SIGSTOP) is woken by another on its host to print its own. SIGQUIT (Ctrl-\\) prints the stacks of a live process at
    any time. Should a thread hold the interpreter's lock for ever, faulthandler's thread, which needs
    none, does the same 60 s later. One that is not stopped ends the process, whatever it does by then.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout, self.rank = timeout, int(os.environ.get("RANK", "0"))
        self._last = time.monotonic()
        self._closed = threading.Event()
        self._neighbours: list[psutil.Process] = []
        assert sys.__stderr__ is not None
        self._err = sys.__stderr__
        faulthandler.register(signal.SIGQUIT, self._err, all_threads=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def meet(self) -> None:
        """Learn which ranks run on this host. A collective."""
        here = socket.gethostname()
        others = [pid for host, pid in of_all_ranks((here, os.getpid())) if host == here and pid != os.getpid()]
        self._neighbours = [psutil.Process(pid) for pid in others]

    def beat(self) -> None:
        """The run moves."""
        self._last = time.monotonic()

    def batch_start(self, state: State, logger: Logger) -> None:
        self.beat()

    def batch_end(self, state: State, logger: Logger) -> None:
        self.beat()

    def stop(self) -> None:
        """Watch no longer."""
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _watch(self) -> None:
        while True:
            faulthandler.dump_traceback_later(self.timeout + _BLOCKED, exit=True, file=self._err)
            if self._closed.wait(min(self.timeout / 10, 5.0)):
                return
            if time.monotonic() - self._last > self.timeout:
                self._give_up()

    def _give_up(self) -> None:
        err = self._err
        who = f"rank {self.rank} (process {os.getpid()} on {socket.gethostname()})"
        print(f"error: {who}: HUNG: no step began or ended for {self.timeout:g} s (trainer.hang_timeout)", file=err)
        for process in self._neighbours:
            if process.is_running() and process.status() == psutil.STATUS_STOPPED:
                print(f"error: process {process.pid} is stopped (SIGSTOP or the like): it is woken", file=err)
                process.send_signal(signal.SIGQUIT)  # delivered first when it wakes
                process.send_signal(signal.SIGCONT)
        err.flush()
        faulthandler.dump_traceback(err, all_threads=True)
        time.sleep(_LAST_WORDS)
        os._exit(1)
