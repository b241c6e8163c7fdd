"""Slot `init`: starting weights, each a function of the seed and the parameter's own name."""

import hashlib
import math

import torch
from pydantic import Field
from torch import Tensor, nn

from flexbert.layers import OutputProjection
from flexbert.registry import INITS
from schema import Component


@INITS.register("full_megatron")
class FullMegatron:
    """Truncated normal; projections into the residual stream are scaled down by sqrt(2 * layers); biases 0.

    Other parameters (norm scales) keep what their class sets. Source: Megatron-LM (arXiv 1909.08053, sec. 3), as in
    ModernBERT's pretraining code, where the head's dense layer has the plain std.
    """

    class Config(Component):
        std: float = Field(0.02, gt=0, description="standard deviation before truncation (ModernBERT: 0.02)")
        cutoff_factor: float = Field(2.0, gt=0, description="truncation, in standard deviations (ModernBERT: 2)")

    def __init__(self, config: Config, *, num_hidden_layers: int) -> None:
        self.config = config
        self.output_std = config.std / math.sqrt(2 * num_hidden_layers)

    def __call__(self, module: nn.Module, seed: int, prefix: str = "") -> None:
        """Fill the linear and embedding weights of `module` in place, skipping what lives on the meta device.

        prefix: path of `module` in the model, so that an encoder alone starts like the encoder inside a model.
        """
        for name, child in module.named_modules(prefix=prefix):
            if not isinstance(child, nn.Linear | nn.Embedding) or child.weight.is_meta:
                continue
            std = self.output_std if isinstance(child, OutputProjection) else self.config.std
            self._draw(child.weight, std, parameter_seed(seed, f"{name}.weight"))
            if isinstance(child, nn.Linear) and child.bias is not None:
                nn.init.zeros_(child.bias)

    @torch.no_grad()
    def _draw(self, weight: Tensor, std: float, seed: int) -> None:
        # Drawn on the CPU in float32, so that every device and dtype starts from the same numbers.
        values = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
        limit = self.config.cutoff_factor * std
        nn.init.trunc_normal_(values, 0.0, std, -limit, limit, generator=torch.Generator("cpu").manual_seed(seed))
        weight.copy_(values)


def parameter_seed(seed: int, name: str) -> int:
    """63-bit seed of one parameter: it does not depend on which other parameters exist."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
