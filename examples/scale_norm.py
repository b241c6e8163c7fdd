"""Slot `norm`: g * x / |x|, with one learned number g for all channels (Nguyen & Salazar 2019, arXiv 1910.05895)."""

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from flexbert import register
from flexbert_core.schema import Component


@register("norm", "scale_norm")
class ScaleNorm(nn.Module):
    """g * x / max(|x|, eps); g starts at sqrt(hidden_size), where the result has the size of a layer norm's."""

    class Config(Component):
        eps: float = Field(1e-5, gt=0, description="least length that is divided by")

    def __init__(self, config: Config, *, hidden_size: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.tensor([math.sqrt(hidden_size)]))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D), same dtype."""
        lengths = hidden_states.float().norm(dim=-1, keepdim=True).clamp_min(self.eps)
        return (hidden_states / lengths * self.weight).to(hidden_states.dtype)
