"""Masking `diffusion`: each row draws its own rate, and what is selected becomes [MASK] (MDLM, arXiv 2406.07524)."""

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from data.feed.masking import (
    MASKINGS,
    RATE,
    SELECT,
    DrawnRates,
    MaskingConfig,
    Targets,
    Vocabulary,
    has_one_rate,
)
from data.feed.philox import RowNames, draws

LOWEST = 1e-3
"""Of the rates (MDLM's code: sampling_eps)."""
_WHOLE = 2**32
_GOLDEN = np.uint64(2654435769)  # 2^32 over the golden ratio


@MASKINGS.register("diffusion")
class DrawnRateMasking:
    """A row's rate t is max(u, 0.001), u uniform over (0, 1]; each token is selected with chance t by itself. Special
    tokens are never selected.

    u is the row's place in the additive recurrence of the golden ratio, shifted by a draw of the plan that the row
    belongs to: so rows that follow each other in a lane have rates far from one another, as with the low-discrepancy
    draw that MDLM takes from arXiv 2107.00630, and each is still a function of the seed and the row alone.

    Departure: rates under 0.001 are taken for 0.001, where MDLM draws none. A sum weighed by 1/t is then exactly that
    of a process whose last step, from 0.001 to 0, is taken at once: its mean is a bound on the negative log-likelihood.
    """

    own_rate: ClassVar[bool] = True

    class Config(MaskingConfig):
        rate: float = Field(default=0.5, ge=0.5, le=0.5, description="the mean: each row draws its own, 0.001 to 1")

        @model_validator(mode="after")
        def _check_rate(self) -> "DrawnRateMasking.Config":
            has_one_rate(self)
            return self

        @property
        def highest_rate(self) -> float:
            return 1.0

        def describe(self) -> str:
            return f"{LOWEST:g} to 1, drawn for each row"

    def __init__(self, config: Config, *, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def mask(self, input_ids: NDArray[np.unsignedinteger], row_ends: NDArray[np.int64], rows: RowNames) -> Targets:
        below = thresholds(rows)
        may = ~self.vocabulary.special[input_ids]
        lengths = np.diff(row_ends, prepend=0)
        chosen = may & (draws(row_ends, rows, SELECT) < np.repeat(below, lengths))
        position = np.flatnonzero(chosen).astype(np.int32)
        token = input_ids[position]
        input_ids[position] = self.vocabulary.mask_token_id
        before = np.concatenate(([0], np.cumsum(may)))
        selectable = before[row_ends] - before[row_ends - lengths]
        return Targets(position, token, DrawnRates(below / _WHOLE, selectable))


def thresholds(rows: RowNames) -> NDArray[np.uint64]:
    """The rates of rows times 2^32, (rows,): a 32-bit number is under one with the rate's chance."""
    plans = RowNames(rows.key, np.zeros_like(rows.number))
    shift = draws(np.arange(1, len(rows.key) + 1), plans, RATE).astype(np.uint64)
    place = (shift + rows.number.astype(np.uint64) * _GOLDEN) % np.uint64(_WHOLE)
    return np.maximum(place + np.uint64(1), np.uint64(round(LOWEST * _WHOLE)))
