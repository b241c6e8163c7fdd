"""FlashAttention-2 as torch itself brings it: packed attention on CUDA without a package.

T tokens, N heads, K key heads, H head dim.

`aten::_flash_attention_forward` and `_backward`, with `cum_seq` and windows (torch 2.7 and later), which
`torch.nn.attention.varlen.varlen_attn` (2.10 and later, windows from 2.12) wraps. They are called here and not by that:
its backward repeats its bits only while `torch.use_deterministic_algorithms` holds for the whole process, and each
longest document would be a number in compiled code, that is, code of its own.

As operators of ours they are traced and not broken off: a compiled block is one graph. `fake` gives what they return by
shape and dtype. Read in torch's sources (aten/src/ATen/native/transformers/cuda/attention_backward.cu, flash_api.cpp):
a side of a window of -1 has no limit; the log-sum-exp of a packed batch is (N, T) float32; the random state is of no
use without dropout, and its second part never; the order of sums in backward hangs on the process's deterministic mode.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_OPERATORS: Any = torch.ops  # typed as a module without members
_FILLING: Any = torch.utils.deterministic

# Arguments by which torch's operators are called here: a torch that has others is not called.
_FORWARD = ("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal")
_FORWARD += ("return_debug_mask",)
_BACKWARD = ("grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k")
_BACKWARD += ("dropout_p", "is_causal", "rng_state", "unused")
_NAMED = ("scale", "window_size_left", "window_size_right")


@functools.cache
def why_not() -> str:
    """Why torch's own kernels cannot be called as they are here; empty when they can."""
    try:
        operators = (_OPERATORS.aten._flash_attention_forward, _OPERATORS.aten._flash_attention_backward)
        schemas = [operator.default._schema for operator in operators]
    except AttributeError:
        return f"torch {torch.__version__} has no packed flash kernels"
    for schema, placed in zip(schemas, (_FORWARD, _BACKWARD), strict=True):
        names = [argument.name for argument in schema.arguments]
        if tuple(names[: len(placed)]) != placed or not set(_NAMED) <= set(names[len(placed) :]):
            return f"torch {torch.__version__} takes other arguments in its packed flash kernels"
    return ""


def attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: Tensor, window: tuple[int, int], deterministic: bool
) -> Tensor:
    """(T, N, H), from queries (T, N, H) and keys and values (T, K, H) in bfloat16 or float16, K a divisor of N.

    longest: int64 scalar in host memory, tokens of the longest sequence or more. deterministic: of backward."""
    return _OPERATORS.flexbert.packed_flash(q, k, v, cu_seqlens, longest, *window, deterministic)[0]


def _tokens(longest: Tensor) -> int:
    # Of sequences of one token the kernel takes another way, with another layout of the log-sum-exp.
    return max(2, int(longest))


@torch.library.custom_op("flexbert::packed_flash", mutates_args=(), device_types="cuda")
def packed_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    longest: Tensor,
    left: int,
    right: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """What attention gives, (T, N, H), and the log-sum-exp of its weights, (N, T) float32."""
    length = _tokens(longest)
    out, logsumexp, *_ = _OPERATORS.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, length, length, 0.0, False, False,
        window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out, logsumexp


@torch.library.custom_op("flexbert::packed_flash_backward", mutates_args=(), device_types="cuda")
def packed_flash_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens: Tensor,
    longest: Tensor,
    left: int,
    right: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, each of its shape."""
    length = _tokens(longest)
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty((), dtype=torch.uint64, device=q.device)
    with _mode(deterministic):
        return _OPERATORS.aten._flash_attention_backward(
            gradient, q, k, v, out, logsumexp, cu_seqlens, cu_seqlens, length, length, 0.0, False, state, unused,
            window_size_left=left, window_size_right=right,
        )  # fmt: skip


@contextmanager
def _mode(deterministic: bool) -> Iterator[None]:
    """The process's deterministic mode, for one call. Not for longer: other operations would refuse to run. And without
    the NaNs that it fills new tensors with."""
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = _FILLING.fill_uninitialized_memory
    try:
        _FILLING.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(deterministic)
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
        _FILLING.fill_uninitialized_memory = filled


@packed_flash.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@packed_flash_backward.register_fake
def _fake_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, longest, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, longest)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Any, ...]:
    gradients = _OPERATORS.flexbert.packed_flash_backward(gradient.contiguous(), *ctx.saved_tensors, *ctx.options)
    return (*gradients, None, None, None, None, None)


packed_flash.register_autograd(_differentiate, setup_context=_keep)
