"""Matrix products: on the CPU in float32 by oneDNN, which torch's own linear leaves to MKL.   M rows, K in, N out.

On two cores of an AMD EPYC (Zen 4) oneDNN did 190 to 210 GFLOPS at the shapes of a 384-wide model, MKL 120 to 180.
In bfloat16 torch itself takes oneDNN.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_AVAILABLE = torch.backends.mkldnn.is_available()


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows @ weight.T + bias, differentiable once: (..., K), (N, K), (N,) or None -> (..., N)."""
    if not _onednn(rows, weight):
        return F.linear(rows, weight, bias)
    if torch.is_grad_enabled():
        return _Linear.apply(rows, weight, bias)  # pyright: ignore[reportReturnType]
    return product(rows, weight, bias)


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same without gradients. Either factor may be a transposed view at no cost."""
    if not _onednn(rows, weight):
        return F.linear(rows, weight, bias)
    return _onednn_linear(rows, weight, bias)


# An operator of our own: torch.compile would take oneDNN's for one over frozen weights.
@torch.library.custom_op("flexbert::onednn_linear", mutates_args=())
def _onednn_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")  # pyright: ignore[reportCallIssue]


@_onednn_linear.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], weight.shape[0])


def _onednn(rows: Tensor, weight: Tensor) -> bool:
    return (
        rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and _AVAILABLE
        and rows.numel() > 0
        and weight.numel() > 0
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return product(rows, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        gradient = gradients[0]
        flat, inputs = gradient.flatten(0, -2), rows.flatten(0, -2)
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(gradient, weight.T) if needs_rows else None,
            product(inputs.T, flat.T).T if needs_weight else None,  # oneDNN is slow the other way round
            flat.sum(0) if needs_bias else None,
        )
