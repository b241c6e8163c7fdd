"""Small parts that several components share."""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from flexbert.kernels import linear
from flexbert.registry import NORMS
from flexbert_core.schema import Component

# How one axis of a weight divides: parts laid end to end, each of some shape. ((heads, head_dim),) * 3 is fused QKV. A
# module says it of its outputs in `output_parts`, of its inputs in `input_parts`; without, an axis is one part.
Parts = tuple[tuple[int, ...], ...]


class Linear(nn.Linear):
    """A linear layer that knows how its outputs and inputs divide, so that each part can grow apart (growing.py)."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, *, outputs: Parts = (), inputs: Parts = ()
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.output_parts = outputs or ((out_features,),)
        self.input_parts = inputs or ((in_features,),)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class OutputProjection(Linear):
    """A linear layer whose output is added to the residual stream. Inits that scale with depth look for this class."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, inputs: Parts = ()) -> None:
        super().__init__(in_features, out_features, bias, inputs=inputs)


def block_matrices(model: nn.Module) -> dict[nn.Parameter, list[int]]:
    """The weights (outputs, inputs) of linear layers in the blocks, in the model's order, and the rows of each of their
    parts: [D, D, D] for queries, keys and values in one matrix, [F, F] for the halves of a gated mlp."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and re.search(r"\blayers\.\d+\.", path):
            parts: Parts = getattr(module, "output_parts", ((module.out_features,),))
            found[module.weight] = [math.prod(part) for part in parts]
    return found


def add_residual(stream: Tensor, branch: Tensor) -> Tensor:
    """stream + branch, in the stream's dtype: under autocast it stays float32 while branches are bfloat16."""
    # Inductor of torch 2.7 would make one addmm of a product and a sum, which refuses to mix dtypes.
    return stream + (branch.to(stream.dtype) if torch.compiler.is_compiling() else branch)


def build_norm(config: Component, hidden_size: int) -> Any:
    """A module from the norm slot."""
    return NORMS.build(config, hidden_size=hidden_size)


def build_optional_norm(config: Component | None, hidden_size: int) -> Any:
    """The same, or nothing."""
    return nn.Identity() if config is None else build_norm(config, hidden_size)
