"""Slot `block`: residual branches that start at nothing (ReZero, Bachlechner et al. 2020, arXiv 2003.04887)."""

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from flexbert import register
from flexbert.kernels.plan import AttentionPlan
from flexbert.positions import Positions
from flexbert.registry import ATTENTIONS, MLPS
from flexbert_core.schema import Component

if TYPE_CHECKING:
    from flexbert import FlexBertConfig


@register("block", "rezero")
class ReZeroBlock(nn.Module):
    """x += a * attention(x); x += b * mlp(x), with learned numbers a and b."""

    needs_final_norm: ClassVar[bool] = True  # the residual stream itself is never normalised

    class Config(Component):
        start: float = Field(0.0, description="what a and b start at (the paper: 0)")

    def __init__(self, config: Config, *, model: "FlexBertConfig", layer_index: int) -> None:
        super().__init__()
        sizes = {"hidden_size": model.hidden_size, "num_attention_heads": model.num_attention_heads}
        self.attn = ATTENTIONS.build(model.attention, **sizes, layer_index=layer_index)
        self.mlp = MLPS.build(model.mlp, hidden_size=model.hidden_size, intermediate_size=model.intermediate_size)
        self.scales = nn.Parameter(torch.full((2,), config.start))

    def forward(self, hidden_states: Tensor, plan: AttentionPlan, positions: Positions) -> Tensor:
        """(T, D) -> (T, D)."""
        hidden_states = hidden_states + self.scales[0] * self.attn(hidden_states, plan, positions)
        return hidden_states + self.scales[1] * self.mlp(hidden_states)
