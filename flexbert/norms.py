"""Slot `norm`: one entry serves every normalisation of a model."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flexbert.registry import NORMS
from schema import Component


@NORMS.register("layernorm")
class LayerNorm(nn.LayerNorm):
    """Layer normalisation (Ba et al. 2016, arXiv 1607.06450), by default without bias as in ModernBERT."""

    class Config(Component):
        eps: float = Field(1e-5, gt=0, le=1, description="added to the variance (ModernBERT: 1e-5, BERT: 1e-12)")
        bias: bool = Field(False, description="learn an offset beside the scale (ModernBERT: no, BERT: yes)")

    def __init__(self, config: Config, *, hidden_size: int) -> None:
        super().__init__(hidden_size, eps=config.eps, bias=config.bias)

    def forward(self, input: Tensor) -> Tensor:
        bias = self.bias
        if bias is None and input.device.type == "cpu":
            # Without one torch's kernel takes twice the time; the result is the same.
            bias = torch.zeros_like(self.weight)
        return F.layer_norm(input, self.normalized_shape, self.weight, bias, self.eps)


@NORMS.register("rmsnorm")
class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, arXiv 1910.07467), inside in float32 (Llama)."""

    class Config(Component):
        eps: float = Field(1e-5, gt=0, le=1, description="added to the mean square (NeoBERT: 1e-5)")

    def __init__(self, config: Config, *, hidden_size: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D), same dtype."""
        return F.rms_norm(hidden_states.float(), self.weight.shape, self.weight.float(), self.eps).to(hidden_states)
