"""Signals that ask a run to stop: it finishes its step, saves, and exits with EXIT_PREEMPTED.

SIGTERM, SIGUSR1, SIGUSR2, SIGHUP (a terminal that is closed; not under nohup) and a first Ctrl-C, sent to any rank or
to all, as often as you like. A second Ctrl-C ends the process at once, as a kill would: the newest whole checkpoint
stays. Before the ranks have met (imports) there is nothing to save, and the process exits with the same code at once.
"""

import contextlib
import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_PREEMPTED = 85  # errno.ERESTART on Linux: run the same command again; no shell or launcher uses it
_NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
_OF_COMPOSER = (128 + signal.SIGTERM, 128 + signal.SIGINT)


class _State:
    received = False
    finishing = False  # a step is finished first


def received() -> bool:
    """Whether this process was asked to stop."""
    return _State.received


def listen() -> None:
    """Take the signals. Call it again after `import composer`, which sets its own handlers of SIGTERM and SIGINT."""
    for number in _NUMBERS:
        under_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
        if not under_nohup and not (number == signal.SIGINT and _State.received):
            signal.signal(number, _ask)


@contextmanager
def from_start_up() -> Iterator[None]:
    """Listen while the block runs; its heavy imports may replace the handlers until it calls `listen` again.

    After it the process ends by itself, and a launcher that asks it to must not change its exit code.
    """
    _State.received = _State.finishing = False
    listen()
    try:
        yield
    except SystemExit as stop:
        raise SystemExit(EXIT_PREEMPTED if stop.code in _OF_COMPOSER else stop.code) from None
    finally:
        _State.received = _State.finishing = False
        for number in _NUMBERS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)


def finish_steps() -> None:
    """From here on a signal is only noted; whoever trains asks `received` after each step."""
    _State.finishing = True
    listen()


def _ask(number: int, _frame: FrameType | None) -> None:
    if number == signal.SIGHUP:
        _leave_terminal()
    if _State.finishing and not _State.received and os.environ.get("RANK", "0") == "0":
        again = "; a second Ctrl-C ends it at once, unsaved" if number == signal.SIGINT else ""
        with contextlib.suppress(OSError):  # not print: the signal may have come within one
            os.write(2, f"{signal.Signals(number).name}: the run finishes its step, saves and ends{again}\n".encode())
    _State.received = True
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not _State.finishing:
        raise SystemExit(EXIT_PREEMPTED)


def _leave_terminal() -> None:
    """Print nowhere what goes to a terminal that is closed: the next line would fail, and end the run unsaved."""
    for output in (1, 2):
        with contextlib.suppress(OSError):  # one that is closed
            if stat.S_ISCHR(os.fstat(output).st_mode) and not os.isatty(output):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, output)
                os.close(nowhere)
