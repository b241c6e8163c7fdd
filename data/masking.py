"""Masking keyed by row: the same row gets the same mask on any rank, worker or restart (BERT's masked-token task)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from data.keyed import philox_key
from schema import Schema

IGNORE = -100


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
class RowKey:
    """Names one row for ever: (epoch, block, carry, row). `carry` tells the plans of one block apart (see order.py)."""

    epoch: int
    block: int
    carry: int
    row: int


class Masker:
    """Draws the mask of a row from Philox, counter = row key. Holds no state between rows."""

    def __init__(self, seed: int, mask_token_id: int, special_ids: list[int], vocab_size: int) -> None:
        self.seed = seed
        self.mask_token_id = mask_token_id
        self.special = np.zeros(vocab_size, bool)
        self.special[special_ids] = True
        self.replacements = np.flatnonzero(~self.special)
        self._keys: dict[int, NDArray[np.uint64]] = {}

    def mask(
        self, input_ids: NDArray[np.int64], key: RowKey, config: MaskingConfig
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Masked copy of a row's ids and its labels (IGNORE where nothing is to be restored), both (tokens,) int64.

        One uniform number decides each token's fate; special tokens are never selected. Random replacements are
        uniform over the vocabulary less the special ids.
        """
        if key.epoch not in self._keys:
            self._keys = {key.epoch: philox_key(self.seed, "mask", key.epoch)}
        counter = np.array([0, key.row, key.block, key.carry], np.uint64)
        rng = np.random.Generator(np.random.Philox(key=self._keys[key.epoch], counter=counter))
        draw = rng.random(len(input_ids))
        draw[self.special[input_ids]] = 1.0
        selected = draw < config.rate
        labels = np.where(selected, input_ids, IGNORE)
        masked = input_ids.copy()
        masked[draw < config.rate * config.mask_fraction] = self.mask_token_id
        low, high = config.rate * config.mask_fraction, config.rate * (config.mask_fraction + config.random_fraction)
        random = (draw >= low) & (draw < high) & selected
        masked[random] = self.replacements[rng.integers(len(self.replacements), size=int(random.sum()))]
        return masked, labels
