"""Slot `embedding`: from token ids to the residual stream.   T packed tokens, D hidden, V vocabulary."""

from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor, nn

from flexbert.layers import build_norm, dropout
from flexbert.registry import EMBEDDINGS
from schema import Component

if TYPE_CHECKING:
    from flexbert.config import FlexBertConfig


@EMBEDDINGS.register("tokens")
class TokenEmbedding(nn.Module):
    """Token table, norm, dropout.

    The row of pad_token_id is an ordinary row: packed batches hold no padding, so it is never looked up.
    """

    class Config(Component):
        norm: bool = Field(True, description="normalise the embeddings with the model's norm")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability of the embeddings")

    def __init__(self, config: Config, *, model: "FlexBertConfig") -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        self.norm = build_norm(model.norm, model.hidden_size) if config.norm else nn.Identity()

    def forward(self, input_ids: Tensor) -> Tensor:
        """(T,) int64 -> (T, D)."""
        return dropout(self.norm(self.tokens(input_ids)), self.config.dropout, self.training)
