"""Child processes that end with the one that started them, however that ends."""

import ctypes
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def ends_with_parent(number: signal.Signals) -> Callable[[], None]:
    """For `preexec_fn`: the kernel sends the child this signal when the thread that started it is gone (prctl(2))."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # found before the fork, in which little is safe

    def before() -> None:
        prctl(_PR_SET_PDEATHSIG, number)

    return before
