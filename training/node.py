"""torchrun for one node of a Slurm job, less two habits: `python -m training.node TORCHRUN_OPTIONS main.py train ...`

It exits with the code of the first process that failed, where torchrun exits with 1: the job script must see
EXIT_PREEMPTED. And SIGUSR1 and SIGUSR2, which Slurm sends before the time limit and which would end torchrun, are
handed on to the processes it started.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from training.signals import EXIT_PREEMPTED


def _hand_on(number: int, _frame: FrameType | None) -> None:
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            os.kill(process.pid, number)


def main(arguments: Sequence[str]) -> int:
    """Run torchrun in this process. Returns the exit code."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, _hand_on)
    try:
        torchrun(list(arguments))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException:  # SIGTERM: torchrun has passed it on, and waited
        return EXIT_PREEMPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
