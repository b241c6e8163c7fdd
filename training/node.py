"""torchrun for one node of a job, less two habits: `python -m training.node TORCHRUN_OPTIONS main.py train ...`

It exits with the code of the first process that failed, where torchrun exits with 1: the job script must see
EXIT_PREEMPTED, and see it only when the ranks have ended with it. And a signal that asks to stop is handed on to the
processes it started, which then end in their own time; torchrun would kill them 30 seconds after SIGTERM, be the
checkpoint written or not, and SIGUSR1 and SIGUSR2, which Slurm sends before the time limit, would end torchrun itself.

A process that fails is named on every node. And a node is reached by the name that Slurm or Kubernetes have for it
(--local-addr): torchrun takes the machine's full name, which may mean nothing to the others.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from training.first_failure import Failure, first, seen
from training.signals import EXIT_PREEMPTED

_NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class _Torchrun(threading.Thread):
    """torchrun, in a thread since it takes the signals for itself where it runs in the main one."""

    def __init__(self, arguments: Sequence[str]) -> None:
        super().__init__(daemon=True)
        self.arguments, self.code = list(arguments), 1
        self.failure: Failure | None = None
        self._error: ChildFailedError | None = None

    def run(self) -> None:
        try:
            torchrun(self.arguments)
            self.code = 0
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            self.failure = seen(rank, failure)
            self._error = error  # its frames hold the store by which the nodes have met
            self.code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        except SystemExit as stop:  # wrong options
            self.code = stop.code if isinstance(stop.code, int) else 1


def main(arguments: Sequence[str]) -> int:
    """Run torchrun in this process. Returns the exit code."""
    arguments = [*own_address(arguments), *arguments]
    has_started = False

    def hand_on(_number: int, _frame: FrameType | None) -> None:
        processes = psutil.Process().children()
        if not processes and not has_started:
            # The nodes have not met: there is nothing to save. torchrun's thread waits in C++, and Python that ends
            # around it may abort there: exit code -6, and no requeue.
            os._exit(EXIT_PREEMPTED)
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
    if thread.failure is not None and thread.code != EXIT_PREEMPTED:
        sys.stderr.write(f"error: {first(thread.failure, arguments).text}; the job ends with it\n")
    return thread.code


def own_address(arguments: Sequence[str]) -> list[str]:
    """--local-addr with what Slurm or Kubernetes (the downward API, as our manifest asks it) call this node."""
    address = os.environ.get("SLURMD_NODENAME") or os.environ.get("POD_IP")
    given = any(argument.startswith(("--local-addr", "--local_addr", "--standalone")) for argument in arguments)
    return [f"--local-addr={address}"] if address and not given else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
