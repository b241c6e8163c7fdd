"""Matrix products: on the CPU in float32 by oneDNN, which torch's own linear leaves to MKL, and so do we for weight
gradients without AVX-512.   M rows, K in, N out.

On two cores of an AMD EPYC (Zen 4) oneDNN did 190 to 210 GFLOPS at the shapes of a 384-wide model, MKL 120 to 180.
In bfloat16 torch itself takes oneDNN, where the CPU has such products (AVX-512). Where it has not, torch's own do 1 to
18 GFLOPS (Zen 3, two cores, float32: 156): there the factors are rounded to bfloat16, multiplied in float32 and the
result is rounded, which is what the instruction does.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_AVAILABLE = torch.backends.mkldnn.is_available()
_ONEDNN: Any = torch.ops.mkldnn
_HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
_LACKS_BFLOAT16 = _AVAILABLE and not _ONEDNN._is_mkldnn_bf16_supported()
CAST_ROWS = 2048  # that the CPU has in float32 at a time where it lacks bfloat16: they stay in the cache


def lacks(dtype: torch.dtype, device: str) -> bool:
    """Whether this machine has no products of its own in a dtype, so that they run in float32."""
    return dtype == torch.bfloat16 and device == "cpu" and _LACKS_BFLOAT16


def factor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor of products in `dtype`, without gradients: rounded to it, and where the machine lacks those, float32
    again."""
    if not lacks(dtype, tensor.device.type):
        return tensor.to(dtype)
    return _round(tensor, torch.empty_like(tensor, dtype=torch.float32), dtype)


def factor_(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`factor` of a float32 tensor that nobody needs after it: on its memory, where the machine lacks `dtype`."""
    return _round(tensor, tensor, dtype) if lacks(dtype, tensor.device.type) else tensor.to(dtype)


def _round(tensor: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
    """Into `out` what `dtype` makes of the tensor, part by part: no copy of all of it is made."""
    rows = max(1, 2**20 // max(1, tensor[:1].numel()))
    for part, place in zip(tensor.split(rows), out.split(rows), strict=True):
        place.copy_(part.to(dtype))
    return out


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
    weight, bias = weight.float(), None if bias is None else bias.float()
    if torch.compiler.is_compiling() or rows.ndim > 2:
        return _onednn_linear(rows.float(), weight, bias).to(rows.dtype)
    out = rows.new_empty(len(rows), len(weight))
    for part, place in zip(rows.split(CAST_ROWS), out.split(CAST_ROWS), strict=True):
        place.copy_(_onednn_linear(part.float(), weight, bias))
    return out


# oneDNN's names for what it can apply to a product while that is in the cache.
_IN_PASSING: dict[Any, str] = {F.gelu: "gelu", F.silu: "swish", F.relu: "relu"}


def activates_in_passing(activation: Callable[[Tensor], Tensor], rows: Tensor, weight: Tensor) -> bool:
    """Whether `activated_product` takes these: on the CPU in float32, without gradients, not while compiling."""
    return (
        activation in _IN_PASSING
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and rows.dtype == torch.float32
        and _onednn(rows, weight)
    )


def activated_product(
    rows: Tensor, weight: Tensor, bias: Tensor | None, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """activation(rows @ weight.T + bias) in one pass: (..., K), (N, K), (N,) or None -> (..., N), a fresh tensor."""
    return _ONEDNN._linear_pointwise(rows, weight, bias, _IN_PASSING[activation], [], "none")


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
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        gradient = gradients[0]
        flat, inputs = gradient.flatten(0, -2), rows.flatten(0, -2)
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(gradient, weight.T) if needs_rows else None,
            _weight_gradient(flat, inputs) if needs_weight else None,
            flat.sum(0) if needs_bias else None,
        )


def _weight_gradient(gradient: Tensor, rows: Tensor) -> Tensor:
    """gradient.T @ rows: (M, N), (M, K) -> (N, K)."""
    if _HAS_AVX512:  # which MKL does not use on every CPU that has it; oneDNN is slow the other way round
        return product(rows.T, gradient.T).T
    # oneDNN copies a transposed first factor, a tenth of the time at 4096 x 384 x 1152. MKL does not, and is as fast
    # (Zen 3, two cores).
    if rows.dtype == torch.float32:
        return torch.mm(gradient.T, rows)
    total = rows.new_zeros(gradient.shape[1], rows.shape[1], dtype=torch.float32)
    for part, its_rows in zip(gradient.split(CAST_ROWS), rows.split(CAST_ROWS), strict=True):
        total.addmm_(part.float().T, its_rows.float())
    return total.to(rows.dtype)
