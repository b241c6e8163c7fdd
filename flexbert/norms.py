"""Slot `norm`: one entry serves every normalisation of a model."""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flexbert.registry import NORMS
from schema import Component


@NORMS.register("layernorm")
class LayerNorm(nn.LayerNorm):
    """Layer normalisation (Ba et al. 2016, arXiv 1607.06450), by default without bias as in ModernBERT."""

    class Config(Component):
        eps: float = Field(1e-5, gt=0, description="added to the variance (ModernBERT: 1e-5, BERT: 1e-12)")
        bias: bool = Field(False, description="learn an offset beside the scale (ModernBERT: no, BERT: yes)")

    def __init__(self, config: Config, *, hidden_size: int) -> None:
        super().__init__(hidden_size, eps=config.eps, bias=config.bias)

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
