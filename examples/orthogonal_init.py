"""Slot `init`: weight matrices that keep lengths (Saxe et al. 2013, arXiv 1312.6120)."""

import torch
from pydantic import Field
from torch import Tensor, nn

from flexbert import register
from flexbert.init import Initializer
from flexbert_core.schema import Component


@register("init", "orthogonal")
class Orthogonal(Initializer):
    """gain * an orthogonal matrix for linear layers; a normal distribution for tables. Biases are 0."""

    class Config(Component):
        gain: float = Field(0.5, gt=0, description="what lengths are multiplied by")
        table_std: float = Field(0.02, gt=0, description="standard deviation of embedding tables")

    def __init__(self, config: Config, *, num_hidden_layers: int) -> None:
        super().__init__(config, num_hidden_layers=num_hidden_layers)
        self.config = config

    def draw(self, values: Tensor, name: str, module: nn.Module, generator: torch.Generator) -> None:
        """Fill `values` with the generator alone: then every rank and every restart starts from the same weights."""
        if isinstance(module, nn.Embedding):
            values.normal_(0.0, self.config.table_std, generator=generator)
        else:
            nn.init.orthogonal_(values, generator=generator).mul_(self.config.gain)
