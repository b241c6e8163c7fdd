"""Slot `norm`: one entry serves every normalisation of a model."""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flexbert.registry import NORMS
from flexbert_core.schema import Component


@NORMS.register("layernorm")
class LayerNorm(nn.LayerNorm):
    """Layer normalisation (Ba et al. 2016, arXiv 1607.06450), by default without bias as in ModernBERT."""

    class Config(Component):
        eps: float = Field(1e-5, gt=0, le=1, description="added to the variance (ModernBERT: 1e-5, BERT: 1e-12)")
        bias: bool = Field(False, description="learn an offset beside the scale (ModernBERT: no, BERT: yes)")

    def __init__(self, config: Config, *, hidden_size: int) -> None:
        super().__init__(hidden_size, eps=config.eps, bias=config.bias)


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
        if torch.compiler.is_compiling():  # Inductor fuses torch's own
            normed = F.rms_norm(hidden_states.float(), self.weight.shape, self.weight.float(), self.eps)
            return normed.to(hidden_states)
        return _RootMeanSquare.apply(hidden_states, self.weight, self.eps)  # pyright: ignore[reportReturnType]


class _RootMeanSquare(torch.autograd.Function):
    """States (..., D), weight (D,) -> (..., D). Keeps its input and one number a row; torch's own, where no kernel
    fuses it, keeps the scaled rows as well."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(states.dtype, torch.float32)
        scales = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=wide)
        scales = scales.square_().div_(states.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(states, weight, scales)
        return (states * scales).mul_(weight).to(states.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        states, weight, scales = ctx.saved_tensors
        width, scales = states.shape[-1], scales.reshape(-1, 1)
        rows, gradient = (each.reshape(-1, width).to(scales.dtype) for each in (states, gradients[0]))
        # y_i = s x_i w_i with s = 1 / sqrt(mean x^2 + eps), so that ds / dx_i = -s^3 x_i / D.
        products = gradient * rows  # only ever summed, never a factor of a product: autocast would round it
        slopes = (products * weight).sum(-1, keepdim=True).mul_(scales.pow(3)).div_(-width)
        of_weight = products.mul_(scales).sum(0).to(weight.dtype)
        of_rows = (gradient * weight).mul_(scales).addcmul_(rows, slopes)
        return of_rows.to(states.dtype).view_as(states), of_weight, None
