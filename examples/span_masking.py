"""A masking from outside the project: spans of neighbouring tokens are restored together.

Words do not count here. The project's own `spans` has whole words.

imports: [span_masking.py]
masking: {name: token_spans, rate: 0.15}
"""

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from data.feed.masking import MASKINGS, HidingConfig, Targets, Vocabulary, hide
from data.feed.philox import RowNames, draws

_START, _LENGTH = 16, 17  # purposes of draws: those under 16 are the project's


@MASKINGS.register("token_spans")
class SpanMasking:
    """Spans of geometric lengths, which end at the border of a document and may touch."""

    class Config(HidingConfig):
        p: float = Field(0.2, gt=0, le=1, description="a span goes on with probability 1 - p")
        longest: int = Field(10, ge=1, le=255, description="tokens that a span has at most")

    def __init__(self, config: Config, *, vocabulary: Vocabulary) -> None:
        self.config, self.vocabulary = config, vocabulary
        goes_on = (1 - config.p) ** np.arange(config.longest)  # probability that a span is longer than 0, 1, ... tokens
        low, high = 0.0, 1.0  # a token is selected unless no span that begins at or before it reaches it
        for _ in range(60):
            self.start = (low + high) / 2
            selects = 1 - np.prod(1 - self.start * goes_on)
            low, high = (self.start, high) if selects < config.rate else (low, self.start)

    def mask(self, input_ids: NDArray[np.unsignedinteger], row_ends: NDArray[np.int64], rows: RowNames) -> Targets:
        """Rows laid end to end: input_ids (tokens,), changed in place; row_ends (rows,)."""
        begins = draws(row_ends, rows, _START) < self.start * 2.0**32
        chance = (draws(row_ends, rows, _LENGTH) + 0.5) / 2.0**32
        longer = np.log(chance) / np.log1p(-self.config.p) if self.config.p < 1 else np.zeros(len(chance))
        length = np.minimum(1 + longer.astype(np.int64), self.config.longest)
        document = np.cumsum(self.vocabulary.special[input_ids])  # [CLS] and [SEP] count on at every border
        selected = begins.copy()
        for k in range(1, min(self.config.longest, len(input_ids))):
            selected[k:] |= (begins & (length > k))[:-k] & (document[k:] == document[:-k])
        return hide(input_ids, row_ends, rows, selected, self.config, self.vocabulary)
