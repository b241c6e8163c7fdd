"""Slot `head`: from the residual stream to vocabulary scores.   M masked tokens, D hidden, V vocabulary."""

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from flexbert.layers import ACTIVATIONS, Activation, build_norm
from flexbert.registry import HEADS
from schema import Component

if TYPE_CHECKING:
    from flexbert.config import FlexBertConfig


class Head(nn.Module):
    """What a head offers: forward, the part before the decoder, and the decoder, which the loss applies in chunks."""

    def decoder(self, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight (V, D) and bias (V,) or None, given the token table (V, D) to tie to."""
        raise NotImplementedError


@HEADS.register("mlm")
class MaskedLanguageHead(Head):
    """norm(act(dense(x))), then the token table as decoder, plus a bias (BERT; ModernBERT without dense bias)."""

    class Config(Component):
        activation: Activation = Field("gelu", description="gelu (exact erf form) or silu, after the dense layer")
        dense_bias: bool = Field(False, description="bias of the dense layer (BERT: yes)")
        decoder_bias: bool = Field(True, description="one learned offset per vocabulary entry")

    def __init__(self, config: Config, *, model: "FlexBertConfig") -> None:
        super().__init__()
        self.dense = nn.Linear(model.hidden_size, model.hidden_size, bias=config.dense_bias)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = build_norm(model.norm, model.hidden_size)
        self.decoder_bias = nn.Parameter(torch.zeros(model.vocab_size)) if config.decoder_bias else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(M, D) -> (M, D)."""
        return self.norm(self.activation(self.dense(hidden_states)))

    def decoder(self, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
        return embeddings, self.decoder_bias
