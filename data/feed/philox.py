"""Random numbers of the tokens of rows, keyed: a function of the row's name, the token's place in it and a purpose.

They come from Philox4x32-10, a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3", table 2 and section 3.3): key = the plan a row belongs to, counter = (position, row, purpose).
"""

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RowNames:
    """Names of the rows of a batch, which decide what is drawn for them: key of each row's plan, and its number there,
    (rows,). document_ends: where documents laid end to end end, (documents,); None: not told."""

    key: NDArray[np.uint64]
    number: NDArray[np.uint32]
    document_ends: NDArray[np.int64] | None = None


def draws(row_ends: NDArray[np.int64], rows: RowNames, purpose: int) -> NDArray[np.uint32]:
    """One number for each token of rows laid end to end, uniform over 32 bits, (tokens,).

    row_ends: (rows,). purpose: numbers of different purposes are independent; 0 to 15 are this project's own.
    """
    out = np.empty(int(row_ends[-1]) if len(row_ends) else 0, np.uint32)
    _fill(row_ends, rows.key, rows.number, np.uint32(purpose), out)
    return out


@numba.njit(cache=True, inline="always")
def philox4x32(
    c0: np.uint32, c1: np.uint32, c2: np.uint32, c3: np.uint32, key: np.uint64
) -> tuple[np.uint32, np.uint32, np.uint32, np.uint32]:
    """Ten rounds: four 32-bit numbers for a 128-bit counter under a 64-bit key (low word first)."""
    k0, k1 = np.uint32(key & np.uint64(0xFFFFFFFF)), np.uint32(key >> np.uint64(32))
    for _ in range(10):
        first = np.uint64(0xD2511F53) * np.uint64(c0)
        second = np.uint64(0xCD9E8D57) * np.uint64(c2)
        c0, c1, c2, c3 = (
            np.uint32(np.uint32(second >> np.uint64(32)) ^ c1 ^ k0),
            np.uint32(second & np.uint64(0xFFFFFFFF)),
            np.uint32(np.uint32(first >> np.uint64(32)) ^ c3 ^ k1),
            np.uint32(first & np.uint64(0xFFFFFFFF)),
        )
        k0 = np.uint32((np.uint64(k0) + np.uint64(0x9E3779B9)) & np.uint64(0xFFFFFFFF))
        k1 = np.uint32((np.uint64(k1) + np.uint64(0xBB67AE85)) & np.uint64(0xFFFFFFFF))
    return c0, c1, c2, c3


@numba.njit(cache=True)
def _fill(
    row_ends: NDArray[np.int64],
    keys: NDArray[np.uint64],
    numbers: NDArray[np.uint32],
    purpose: np.uint32,
    out: NDArray[np.uint32],
) -> None:
    begin = 0
    four = np.empty(4, np.uint32)
    for row in range(len(row_ends)):
        for start in range(begin, row_ends[row], 4):
            place = np.uint32((start - begin) >> 2)
            four[0], four[1], four[2], four[3] = philox4x32(place, numbers[row], purpose, np.uint32(0), keys[row])
            for i in range(min(4, row_ends[row] - start)):
                out[start + i] = four[i]
        begin = row_ends[row]
