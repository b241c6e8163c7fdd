"""torchrun for one node of a Slurm job, less two habits: `python -m training.node TORCHRUN_OPTIONS main.py train ...`

It exits with the code of the first process that failed, where torchrun exits with 1: the job script must see
EXIT_PREEMPTED, and see it only when the ranks have ended with it. And a signal that asks to stop is handed on to the
processes it started, which then end in their own time; torchrun would kill them 30 seconds after SIGTERM, be the
checkpoint written or not, and SIGUSR1 and SIGUSR2, which Slurm sends before the time limit, would end torchrun itself.
"""

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from training.signals import EXIT_PREEMPTED

_NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class _Torchrun(threading.Thread):
    """torchrun, in a thread since it takes the signals for itself where it runs in the main one."""

    def __init__(self, arguments: Sequence[str]) -> None:
        super().__init__(daemon=True)
        self.arguments, self.code = list(arguments), 1

    def run(self) -> None:
        try:
            torchrun(self.arguments)
            self.code = 0
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            self.code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        except SystemExit as stop:  # wrong options
            self.code = stop.code if isinstance(stop.code, int) else 1


def main(arguments: Sequence[str]) -> int:
    """Run torchrun in this process. Returns the exit code."""
    has_started = False

    def hand_on(_number: int, _frame: FrameType | None) -> None:
        processes = psutil.Process().children()
        if not processes and not has_started:
            raise SystemExit(EXIT_PREEMPTED)  # the nodes have not met: there is nothing to save
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                # Whatever it was: they all ask for the same, and two SIGINTs, one of them the terminal's, end a rank.
                process.terminate()

    for number in _NUMBERS:
        signal.signal(number, hand_on)
    # It warns that signals would orphan the processes, since it has no handlers in a thread.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.ERROR)
    thread = _Torchrun(arguments)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
        has_started = has_started or bool(psutil.Process().children())
    return thread.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
