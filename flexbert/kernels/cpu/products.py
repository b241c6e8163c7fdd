"""Matrix products: on the CPU in float32 by oneDNN, which torch's own linear leaves to MKL.   M rows, K in, N out.

On two cores of an AMD EPYC (Zen 4) oneDNN did 190 to 210 GFLOPS at the shapes of a 384-wide model, MKL 120 to 180;
weight gradients take the same time by either, and are left to torch.
In bfloat16 torch itself takes oneDNN, where the CPU has such products (AVX-512). Where it has not, torch's own do 1 to
18 GFLOPS (Zen 3, two cores, float32: 156): there the factors are rounded to bfloat16, multiplied in float32 and the
result is rounded, which is what the instruction does.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_AVAILABLE = torch.backends.mkldnn.is_available()
_ONEDNN: Any = torch.ops.mkldnn
_LACKS_BFLOAT16 = _AVAILABLE and not _ONEDNN._is_mkldnn_bf16_supported()


def lacks(dtype: torch.dtype, device: str) -> bool:
    """Whether this machine has no products of its own in a dtype, so that they run in float32."""
    return dtype == torch.bfloat16 and device == "cpu" and _LACKS_BFLOAT16


def factor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor of products in `dtype`, without gradients: rounded to it, and where the machine lacks those, float32
    again."""
    rounded = tensor.to(dtype)
    return rounded.float() if lacks(dtype, tensor.device.type) else rounded


def factor_(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`factor` of a float32 tensor that nobody needs after it: on its memory, where the machine lacks `dtype`."""
    rounded = tensor.to(dtype)
    return tensor.copy_(rounded) if lacks(dtype, tensor.device.type) else rounded


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows @ weight.T + bias, differentiable once: (..., K), (N, K), (N,) or None -> (..., N)."""
    device = rows.device.type
    if (
        device == "cpu"
        and torch.is_autocast_enabled(device)
        and lacks(dtype := torch.get_autocast_dtype(device), device)
    ):
        rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return linear(rows, weight, bias)
    if not _onednn(rows, weight):
        return F.linear(rows, weight, bias)
    if torch.is_grad_enabled():
        return _Linear.apply(rows, weight, bias)  # pyright: ignore[reportReturnType]
    return product(rows, weight, bias)


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same without gradients. Either factor may be a transposed view at no cost."""
    if not _onednn(rows, weight):
        return F.linear(rows, weight, bias)
    if rows.dtype == torch.float32:
        return _onednn_linear(rows, weight, bias)
    return _onednn_linear(rows.float(), weight.float(), None if bias is None else bias.float()).to(rows.dtype)


def softmax_(scores: Tensor) -> Tensor:
    """softmax over the last axis of a tensor that nobody needs after it: on its memory, where torch's kernel is tested
    here with one tensor for both."""
    return torch.softmax(scores, -1, out=scores if scores.device.type == "cpu" else None)


def _onednn_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        return _compiled_linear(rows, weight, bias)
    return _ONEDNN._linear_pointwise(rows, weight, bias, "none", [], "")


# An operator of our own: torch.compile would take oneDNN's for one over frozen weights.
@torch.library.custom_op("flexbert::onednn_linear", mutates_args=())
def _compiled_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _ONEDNN._linear_pointwise(rows, weight, bias, "none", [], "")


@_compiled_linear.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], weight.shape[0])


def _onednn(rows: Tensor, weight: Tensor) -> bool:
    return (
        rows.device.type == "cpu"
        and rows.dtype == weight.dtype
        and (rows.dtype == torch.float32 or lacks(rows.dtype, "cpu"))
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
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        gradient = gradients[0]
        flat, inputs = gradient.flatten(0, -2), rows.flatten(0, -2)
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(gradient, weight.T) if needs_rows else None,
            (flat.T.float() @ inputs.float()).to(rows.dtype) if needs_weight else None,
            flat.sum(0) if needs_bias else None,
        )
