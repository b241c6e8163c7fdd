"""Masking keyed by row: the same row gets the same mask on any rank, worker or restart (BERT's masked-token task).

Random numbers come from Philox4x32-10, a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3", table 2 and section 3.3): key = the plan a row belongs to, counter = (position, row, purpose).
"""

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from data.keyed import philox_key
from flexbert_core.schema import Schema

IGNORE = -100

_SELECT, _REPLACE = 0, 1  # purposes


class MaskingConfig(Schema):
    """Which tokens the model must restore. Fractions in [0, 1]. Sources: BERT (80/10/10), ModernBERT (rate 0.3)."""

    rate: float = Field(default=0.3, gt=0, le=1, description="probability that a token is selected")
    mask_fraction: float = Field(
        default=0.8, ge=0, le=1, description="of the selected tokens, the share that becomes [MASK]"
    )
    random_fraction: float = Field(
        default=0.1, ge=0, le=1, description="of the selected tokens, the share that becomes a random token"
    )

    @model_validator(mode="after")
    def _check_split(self) -> "MaskingConfig":
        if self.mask_fraction + self.random_fraction > 1:
            raise ValueError("mask_fraction + random_fraction must be at most 1 (the rest keeps its token)")
        return self


@dataclass(frozen=True)
class RowNames:
    """Names of the rows of a batch, which decide their masks: key of each row's plan, and its number there, (rows,)."""

    key: NDArray[np.uint64]
    number: NDArray[np.uint32]


@dataclass(frozen=True)
class Targets:
    """What is to be restored: positions in the batch, ascending, (masked,) int32, and the tokens, (masked,)."""

    position: NDArray[np.int32]
    token: NDArray[np.unsignedinteger]


class Masker:
    """Draws the masks of rows. Holds no state between calls."""

    def __init__(self, seed: int, mask_token_id: int, special_ids: list[int], vocab_size: int) -> None:
        self.seed = seed
        self.mask_token_id = mask_token_id
        self.special = np.zeros(vocab_size, bool)
        self.special[special_ids] = True
        self.replacements = np.flatnonzero(~self.special)

    def key(self, lane: int, block: int, carry: int) -> int:
        """The 64-bit Philox key of a plan's rows."""
        return int(philox_key(self.seed, "mask", lane, block, carry)[0])

    def mask(
        self, input_ids: NDArray[np.unsignedinteger], row_ends: NDArray[np.int64], rows: RowNames, config: MaskingConfig
    ) -> Targets:
        """Mask rows laid end to end, in place. input_ids: (tokens,) uint16 or uint32; row_ends: (rows,) int64.

        One number decides each token's fate; special tokens are never selected. Random replacements are uniform over
        the vocabulary less the special ids, to one part in 2 ** 32.
        """
        low = config.rate * config.mask_fraction
        edges = np.array([low, low + config.rate * config.random_fraction, config.rate])
        thresholds = np.round(edges * 2.0**32).astype(np.uint64)
        position = np.empty(len(input_ids), np.int32)
        token = np.empty_like(input_ids)
        count = _mask_rows(
            input_ids,
            row_ends,
            rows.key,
            rows.number,
            thresholds,
            self.special,
            self.replacements,
            self.mask_token_id,
            position,
            token,
        )
        return Targets(position[:count], token[:count])


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
def _mask_rows(
    ids: NDArray[np.unsignedinteger],
    row_ends: NDArray[np.int64],
    keys: NDArray[np.uint64],
    numbers: NDArray[np.uint32],
    thresholds: NDArray[np.uint64],
    special: NDArray[np.bool_],
    replacements: NDArray[np.int64],
    mask_token_id: int,
    position: NDArray[np.int32],
    token: NDArray[np.unsignedinteger],
) -> int:
    masked_below, random_below, selected_below = thresholds[0], thresholds[1], thresholds[2]
    draws = np.empty(4, np.uint32)
    count = begin = 0
    for row in range(len(row_ends)):
        key, number = keys[row], numbers[row]
        for start in range(begin, row_ends[row], 4):
            place = np.uint32((start - begin) >> 2)
            draws[0], draws[1], draws[2], draws[3] = philox4x32(place, number, np.uint32(_SELECT), np.uint32(0), key)
            for i in range(min(4, row_ends[row] - start)):
                at = start + i
                draw = np.uint64(draws[i])
                if draw >= selected_below or special[ids[at]]:
                    continue
                position[count] = at
                token[count] = ids[at]
                count += 1
                if draw < masked_below:
                    ids[at] = mask_token_id
                elif draw < random_below:
                    high, low, _, _ = philox4x32(np.uint32(at - begin), number, np.uint32(_REPLACE), np.uint32(0), key)
                    # A 64-bit fraction times the number of choices, in two steps that fit into 64 bits.
                    size = np.uint64(len(replacements))
                    carry = (np.uint64(low) * size) >> np.uint64(32)
                    ids[at] = replacements[(np.uint64(high) * size + carry) >> np.uint64(32)]
        begin = row_ends[row]
    return count
