"""Torch's own attention kernel for CPUs, called as it is fastest."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ATTENTION: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def prefers_float32(dtype: torch.dtype) -> bool:
    """Whether the kernel is slower in this dtype than in float32: without AMX its bfloat16 products are (by 1.2 on a
    Zen 4)."""
    return dtype in (torch.bfloat16, torch.float16) and not _has_amx()


@functools.cache
def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, causal: bool = False) -> Tensor:
    """Attention of tables q (B, N, M, H) and k, v (B, N, L, H): (B, N, M, H) of the dtype of q.

    mask: without gradient, bool (True is seen) or added to the scores, broadcast to (B, N, M, L).
    dropout_p: 0 where `prefers_float32`. causal: without a mask, of as many queries as keys: those behind a query are
    not seen.
    """
    if prefers_float32(q.dtype):
        assert dropout_p == 0.0
        return _in_float32(q, k, v, mask, causal)
    # Each block of queries reads keys and values anew: inference at 8192 tokens takes 1.05 times as long when those of
    # a head do not lie together (Zen 4).
    return F.scaled_dot_product_attention(
        q, k.contiguous(), v.contiguous(), attn_mask=mask, dropout_p=dropout_p, is_causal=causal
    )


def _in_float32(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The kernel computes in float32; for the gradients the narrower tables are kept, 0.93 of all that a step keeps. A
    mask that is added is float32."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, float("-inf"))
    # A view of the values would keep the whole projection.
    return _InFloat32.apply(q, k, v.contiguous(), mask, causal)  # pyright: ignore[reportReturnType]


class _InFloat32(torch.autograd.Function):
    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        found, log_norm = _ATTENTION(*_wide(q, k, v), 0.0, causal, attn_mask=mask)
        # A token's heads lie together, as after torch's own kernel: compiled code is made for one layout.
        out = found.transpose(1, 2).to(q.dtype, memory_format=torch.contiguous_format).transpose(1, 2)
        ctx.causal = causal
        ctx.save_for_backward(q, k, v, out, log_norm, mask)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_norm, mask = ctx.saved_tensors
        gradient, *tables = _wide(gradients[0], q, k, v, out)
        found = _ATTENTION_BACKWARD(gradient, *tables, log_norm, 0.0, ctx.causal, attn_mask=mask)
        return *(part.to(q.dtype) for part in found), None, None


def _wide(*tables: Tensor) -> Iterator[Tensor]:
    return (table.to(torch.float32, memory_format=torch.contiguous_format) for table in tables)
