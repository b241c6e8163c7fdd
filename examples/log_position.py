"""Slot `position`: a learned vector for each power of two of the distance from the document's start."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flexbert import register
from flexbert.positions import Position
from flexbert_core.schema import Component

if TYPE_CHECKING:
    from flexbert import FlexBertConfig


@register("position", "log_buckets")
class LogBuckets(Position):
    """Token 0 has bucket 0, token 1 bucket 1, tokens 2 and 3 bucket 2, tokens 4 to 7 bucket 3, and so on."""

    class Config(Component):
        pass

    def __init__(self, config: Config, *, model: "FlexBertConfig") -> None:
        super().__init__()
        self.table = nn.Embedding(model.max_position_embeddings.bit_length() + 1, model.hidden_size)

    def embed(self, position_ids: Tensor, max_seqlen: int) -> Tensor:
        """Position ids (T,), from 0 on in each document -> (T, D), which is added to the token embeddings."""
        # frexp is exact, where a rounded logarithm is not: a number of b bits has exponent b.
        buckets = torch.frexp(position_ids.double()).exponent.long()
        return self.table(buckets.clamp_max(self.table.num_embeddings - 1))
