"""Slot `embedding`: every entry of the vocabulary has a learned volume of its own."""

from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor, nn

from flexbert import register
from flexbert.layers import build_norm
from flexbert_core.schema import Component

if TYPE_CHECKING:
    from flexbert import FlexBertConfig


@register("embedding", "gated")
class GatedEmbedding(nn.Module):
    """norm(2 * sigmoid(gate) * token + what the position adds)."""

    class Config(Component):
        # The block `prenorm` asks for this: it leaves out the first norm where the embedding has one.
        norm: bool = Field(True, description="normalise the embeddings with the model's norm")

    def __init__(self, config: Config, *, model: "FlexBertConfig") -> None:
        super().__init__()
        # A head may tie its decoder to `tokens`: an embedding must have a table of this name, (V, D).
        self.tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        self.gates = nn.Embedding(model.vocab_size, 1)
        self.norm = build_norm(model.norm, model.hidden_size) if config.norm else nn.Identity()

    def forward(self, input_ids: Tensor, added: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        """(T,) int64 -> (T, D). added: (T, D), from the slot `position`."""
        states = 2.0 * self.gates(input_ids).sigmoid() * self.tokens(input_ids)
        return self.norm(states if added is None else states + added)
