"""How the C library hands out the large blocks that tensors on the CPU live in."""

import ctypes
import sys

# Parameters of glibc's mallopt(3), from malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Keep memory that tensors have freed in this process, for the next ones.

    By default glibc returns every block over 32 MB to the kernel, which then clears each page anew: a third of the time
    of a bfloat16 training step on a CPU (benchmarks.encoder shows it on either side). The process stays at its peak
    size, which the next step would need again anyway. Does nothing without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
        mallopt(_TOP_PAD, 64 << 20)
