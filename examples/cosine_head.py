"""Slot `head`: masked tokens are scored by the angle to the token table, not by the length of the states."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flexbert import register
from flexbert.heads import Head
from flexbert.layers import Linear
from flexbert_core.schema import Component

if TYPE_CHECKING:
    from flexbert import FlexBertConfig


@register("head", "cosine")
class CosineHead(Head):
    """scale * dense(x) / |dense(x)|, scored against the token table."""

    class Config(Component):
        scale: float = Field(
            16.0, gt=0, description="length of the states that are scored, at the start; it is learned"
        )

    def __init__(self, config: Config, *, model: "FlexBertConfig") -> None:
        super().__init__()
        self.dense = Linear(model.hidden_size, model.hidden_size, bias=False)
        self.scale = nn.Parameter(torch.tensor([config.scale]))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(M, D) of masked tokens -> (M, D), which the loss multiplies by the decoder."""
        return self.scale * F.normalize(self.dense(hidden_states), dim=-1)

    def decoder(self, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight (V, D) and bias: here the token table itself, and none."""
        return embeddings, None
