"""Masking `next`: nothing is hidden, and each token is to be told from those before it."""

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from data.feed.masking import MASKINGS, MaskingConfig, Targets, Vocabulary, has_one_rate
from data.feed.philox import RowNames


@MASKINGS.register("next")
class NextToken:
    """The target of a token is the one behind it in its document; the last has none. [SEP], which ends a document, is a
    target, and so are unknown tokens. For models whose attention is causal: objective `clm` brings it along."""

    causal: ClassVar[bool] = True
    own_rate: ClassVar[bool] = True

    class Config(MaskingConfig):
        rate: float = Field(default=1.0, ge=1, le=1, description="every token but the last of a document has a target")

        @model_validator(mode="after")
        def _check_rate(self) -> "NextToken.Config":
            has_one_rate(self)
            return self

    def __init__(self, config: Config, *, vocabulary: Vocabulary) -> None:
        pass

    def mask(self, input_ids: NDArray[np.unsignedinteger], row_ends: NDArray[np.int64], rows: RowNames) -> Targets:
        assert rows.document_ends is not None
        has_target = np.ones(len(input_ids), bool)
        has_target[rows.document_ends - 1] = False
        position = np.flatnonzero(has_target)
        return Targets(position.astype(np.int32), input_ids[position + 1])
