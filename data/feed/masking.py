"""Slot `masking`: which tokens a model must restore, and what stands in their place.

A masking is keyed by row: it is a function of (seed, name of the row), so the same row gets the same mask on any rank,
in any worker, after any restart. An entry draws with `data.feed.philox.draws`, never from a generator of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, Self

import numba
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from data.feed.philox import RowNames, draws, philox4x32
from data.words import WordEdges, word_edges
from flexbert_core.schema import Component, Registry, Schema

IGNORE = -100
DEFAULT = "tokens"
"""The masking of a section that names none."""

SELECT, _REPLACE, _FATE, SPANS, RATE = range(5)  # purposes of draws


class RateSchedule(Schema):
    """How the rate moves over a phase, as a function of the tokens that the phase has trained before a step."""

    to: float = Field(gt=0, le=1, description="rate at the end of the phase; it begins with `rate`")
    shape: Literal["linear", "cosine"] = Field(
        default="linear", description="a line, or half a cosine wave (arXiv 1608.03983, eq. 5 without restarts)"
    )

    def share(self, progress: float) -> float:
        """Of the way from `rate` to `to`. progress: share of the phase's tokens before the step, in [0, 1)."""
        return progress if self.shape == "linear" else 0.5 * (1 - math.cos(math.pi * progress))


class MaskingConfig(Component):
    """What the Config of every masking has."""

    rate: float = Field(default=0.3, gt=0, le=1, description="share of the tokens that are selected, as expected")
    rate_schedule: RateSchedule | None = Field(
        default=None,
        description="how the rate moves over one phase, such as {to: 0.15}; the phase after it begins where it ended; "
        "absent: it does not",
    )

    def at(self, progress: float) -> Self:
        """With the rate of a step, and no schedule: what an entry is built of. progress: see RateSchedule.share."""
        schedule = self.rate_schedule
        return self if schedule is None else self._with_rate(self._between(schedule, schedule.share(progress)))

    def settled(self) -> Self:
        """As the next phase has it, unless it says otherwise."""
        return self if self.rate_schedule is None else self._with_rate(self.rate_schedule.to)

    @property
    def mean_rate(self) -> float:
        """Over the phase: both shapes are half of the way on average."""
        return self.rate if self.rate_schedule is None else self._between(self.rate_schedule, 0.5)

    @property
    def highest_rate(self) -> float:
        """In the phase."""
        return self.rate if self.rate_schedule is None else max(self.rate, self.rate_schedule.to)

    def describe(self) -> str:
        """The rate, for people."""
        schedule = self.rate_schedule
        return f"{self.rate:g}" + ("" if schedule is None else f" to {schedule.to:g} {schedule.shape}")

    def _between(self, schedule: RateSchedule, share: float) -> float:
        return self.rate + (schedule.to - self.rate) * share

    def _with_rate(self, rate: float) -> Self:
        return self.model_copy(update={"rate": rate, "rate_schedule": None})


def has_one_rate(masking: MaskingConfig) -> MaskingConfig:
    """For text that is measured, and not trained on. Raises ValueError for a schedule."""
    if masking.rate_schedule is not None:
        raise ValueError("rate_schedule: is for phases; what is measured has one rate: set it to null")
    return masking


MASKINGS = Registry(
    "masking",
    filled_by=["data.feed.whole_words", "data.feed.spans", "data.feed.next_token", "data.feed.drawn_rates"],
    base=MaskingConfig,
)


def is_causal(masking: MaskingConfig) -> bool:
    """Whether a model must see nothing behind a token: else it would see what it is to predict. Such an entry has the
    class attribute `causal = True`."""
    return getattr(MASKINGS.entries[masking.name], "causal", False)


def has_own_rate(name: str) -> bool:
    """Whether the rate of an entry, known or not, is no choice. Such an entry has the class attribute `own_rate =
    True`."""
    return getattr(MASKINGS.entries.get(name), "own_rate", False)


@dataclass(frozen=True)
class Vocabulary:
    """What a masking may know of the tokens. special: (vocab_size,), which are never selected. replacements: ids of the
    others, ascending. tokenizer: its folder on local disk."""

    mask_token_id: int
    special: NDArray[np.bool_]
    replacements: NDArray[np.int64]
    tokenizer: Callable[[], Path]

    @cached_property
    def words(self) -> WordEdges:
        """Which tokens go on with a word. Raises ValueError where the tokenizer does not tell."""
        return word_edges(self.tokenizer(), self.special)


@dataclass(frozen=True)
class Targets:
    """What is to be restored: positions in the batch, ascending, (masked,) int32, and the tokens, (masked,).

    drawn: of a masking that draws a rate for each row.
    """

    position: NDArray[np.int32]
    token: NDArray[np.unsignedinteger]
    drawn: "DrawnRates | None" = None


@dataclass(frozen=True)
class DrawnRates:
    """Of each row, (rows,): a token's chance to be selected, float64 in (0, 1], and how many tokens had it, int64."""

    rate: NDArray[np.float64]
    selectable: NDArray[np.int64]


class Masking(Protocol):
    """What an entry offers; it is constructed with (config, vocabulary=Vocabulary). It holds no state between calls."""

    def mask(self, input_ids: NDArray[np.unsignedinteger], row_ends: NDArray[np.int64], rows: RowNames) -> Targets:
        """Mask rows laid end to end, in place. input_ids: (tokens,) uint16 or uint32; row_ends: (rows,) int64."""
        ...


class HidingConfig(MaskingConfig):
    """Of a masking that puts [MASK], a random token or the token itself in a selected token's place (BERT 80/10/10)."""

    mask_fraction: float = Field(
        default=0.8, ge=0, le=1, description="of the selected tokens, the share that becomes [MASK]"
    )
    random_fraction: float = Field(
        default=0.1, ge=0, le=1, description="of the selected tokens, the share that becomes a random token"
    )

    @model_validator(mode="after")
    def _check_split(self) -> "HidingConfig":
        if self.mask_fraction + self.random_fraction > 1:
            raise ValueError("mask_fraction + random_fraction must be at most 1 (the rest keeps its token)")
        return self


@MASKINGS.register(DEFAULT)
class TokenMasking:
    """Each token is selected by itself (BERT, arXiv 1810.04805, section 3.1; ModernBERT: rate 0.3)."""

    class Config(HidingConfig):
        pass

    def __init__(self, config: Config, *, vocabulary: Vocabulary) -> None:
        low = config.rate * config.mask_fraction
        edges = np.array([low, low + config.rate * config.random_fraction, config.rate])
        self.thresholds, self.vocabulary = np.round(edges * 2.0**32).astype(np.uint64), vocabulary

    def mask(self, input_ids: NDArray[np.unsignedinteger], row_ends: NDArray[np.int64], rows: RowNames) -> Targets:
        """One number decides each token's fate; special tokens are never selected. Random replacements are uniform
        over the vocabulary less the special ids, to one part in 2 ** 32."""
        position = np.empty(len(input_ids), np.int32)
        token = np.empty_like(input_ids)
        count = _select_and_hide(
            input_ids,
            row_ends,
            rows.key,
            rows.number,
            self.thresholds,
            self.vocabulary.special,
            self.vocabulary.replacements,
            self.vocabulary.mask_token_id,
            position,
            token,
        )
        return Targets(position[:count], token[:count])


def hide(
    input_ids: NDArray[np.unsignedinteger],
    row_ends: NDArray[np.int64],
    rows: RowNames,
    selected: NDArray[np.bool_],
    config: HidingConfig,
    vocabulary: Vocabulary,
    drawn_by: NDArray[np.int64] | None = None,
) -> Targets:
    """Put [MASK], random tokens or the tokens themselves in the place of the selected ones, as the config's fractions
    say, each by a draw of its own, or by that of the token `drawn_by`, (tokens,). Special tokens are left out.
    selected: (tokens,). Changes input_ids."""
    position = np.flatnonzero(selected & ~vocabulary.special[input_ids]).astype(np.int32)
    token = input_ids[position]
    fate = draws(row_ends, rows, _FATE)[position if drawn_by is None else drawn_by[position]] / 2.0**32
    masked = fate < config.mask_fraction
    random = ~masked & (fate < config.mask_fraction + config.random_fraction)
    choice = draws(row_ends, rows, _REPLACE)[position[random]].astype(np.uint64) * len(vocabulary.replacements) >> 32
    input_ids[position[masked]] = vocabulary.mask_token_id
    input_ids[position[random]] = vocabulary.replacements[choice]
    return Targets(position, token)


@numba.njit(cache=True)
def _select_and_hide(
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
            draws[0], draws[1], draws[2], draws[3] = philox4x32(place, number, np.uint32(SELECT), np.uint32(0), key)
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
