"""Slot `mlp`: the larger of two linear maps (maxout, Goodfellow et al. 2013, arXiv 1302.4389), then the way back."""

import torch
from pydantic import Field
from torch import Tensor, nn

from flexbert import register
from flexbert.dropout import Dropout
from flexbert.layers import Linear, OutputProjection
from flexbert_core.schema import Component


@register("mlp", "maxout")
class Maxout(nn.Module):
    """Wo(max(a, b)) with [a|b] = Wi(x)."""

    class Config(Component):
        out_dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability after Wo")

    def __init__(self, config: Config, *, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        # `outputs` says that the rows are two halves, so that growing a model grows each half by itself.
        self.Wi = Linear(hidden_size, 2 * intermediate_size, bias=True, outputs=((intermediate_size,),) * 2)
        # Depth-scaled inits look for OutputProjection: what is added to the residual stream.
        self.Wo = OutputProjection(intermediate_size, hidden_size, bias=True)
        # FlexBERT's dropout: its masks do not depend on how a batch is split into microbatches and ranks.
        self.out_dropout = Dropout(config.out_dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        first, second = self.Wi(hidden_states).chunk(2, dim=-1)
        return self.out_dropout(self.Wo(torch.maximum(first, second)))
