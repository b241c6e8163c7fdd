"""Attention over packed sequences: one function, several kernels, all equal to `eager`.

T packed tokens, N heads, H head dim. Layout everywhere: (T, N, H). A kernel that is named and cannot run is an error;
only `auto` chooses.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flexbert.kernels import cpu, gpu
from flexbert.kernels.gpu import Window
from flexbert.kernels.plan import AttentionPlan, Bucket
from flexbert.packed import spread_rows
from flexbert_core.schema import ConfigError

log = logging.getLogger(__name__)

Backend = Literal["auto", "eager", "sdpa", "tiled", "flash2", "flash3", "torch_flash", "flex"]
_GPU = ("flash2", "flash3", "torch_flash", "flex")
_TRACED = ("torch_flash",)  # others are no part of compiled code


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: AttentionPlan,
    *,
    window_size: Window,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
    wanted: Tensor | None = None,
) -> Tensor:
    """softmax(q k / sqrt(H) - slope |i - j|) v within each sequence: (T, N, H) -> (T, N, H) of the same dtype.

    keys, values: (T, K, H), K a divisor of N; query heads n * N/K .. share key-value head n.
    window_size: (left, right) tokens seen besides self; -1: all. The right side is as the left, or 0: causal attention,
    as it is, too, on a plan that is causal.
    alibi_slopes: (N,) float32; None: 0. Constants: they get no gradient.
    dropout_p: of the attention weights, drawn from torch's global generator.
    wanted: (M,) int64, rising: the queries whose results are asked for, (M, N, H); None: all. Where whole sequences
    attend by sdpa, the others are not computed.
    Raises ConfigError when the named backend cannot run here.
    """
    if plan.causal:
        window_size = (window_size[0], 0)
    device = queries.device.type
    if _knows_autocast(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)  # a norm of queries and keys leaves them in float32
        queries, keys, values = queries.to(dtype), keys.to(dtype), values.to(dtype)
    alibi, drops, head_dim = alibi_slopes is not None, dropout_p > 0, queries.shape[-1]
    if backend == "auto":
        backend = choose_backend(device, queries.dtype, alibi, drops, head_dim)
    else:
        require_backend(backend, device, queries.dtype, alibi, drops, head_dim)
    if backend in _TRACED and queries.numel():
        out = KERNELS[backend](queries, keys, values, plan, window_size, alibi_slopes, dropout_p)
        return out if wanted is None else out.index_select(0, wanted)
    return _untraced(queries, keys, values, plan, window_size, alibi_slopes, dropout_p, backend, wanted)


@torch._dynamo.assume_constant_result  # not traced otherwise
def _knows_autocast(device: str) -> bool:
    return torch.amp.autocast_mode.is_autocast_available(device)


@torch.compiler.disable  # kernels of their own, over plans whose shapes change with every batch
def _untraced(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: AttentionPlan,
    window_size: Window,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    backend: Backend,
    wanted: Tensor | None,
) -> Tensor:
    groups = queries.shape[1] // keys.shape[1]
    if groups > 1 and (backend not in _GPU or not queries.numel()):
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    if not queries.numel():
        # Kernels refuse empty batches. The result must still hang on all three, for gradients of zero.
        out = queries + keys + values
    elif (
        wanted is not None
        and len(wanted)
        and backend == "sdpa"
        and alibi_slopes is None
        and _is_global(plan, window_size)
    ):
        return _sdpa(queries.index_select(0, wanted), keys, values, plan, window_size, None, dropout_p, wanted)
    else:
        out = KERNELS[backend](queries, keys, values, plan, window_size, alibi_slopes, dropout_p)
    return out if wanted is None else out.index_select(0, wanted)


@torch._dynamo.assume_constant_result
def choose_backend(
    device: str,
    dtype: torch.dtype,
    alibi: bool = False,
    drops: bool = False,
    head_dim: int | None = None,
) -> Backend:
    """The kernel that `auto` stands for: the first of flash3, flash2, torch_flash, tiled (where it is the fastest) and
    sdpa that can run. Logged once for each case.

    alibi, drops: whether it must do ALiBi, or dropout of attention weights. head_dim: H, if known.
    """
    return _chosen(device, dtype, alibi, drops, head_dim, gpu.is_deterministic())


@functools.cache
def _chosen(
    device: str, dtype: torch.dtype, alibi: bool, drops: bool, head_dim: int | None, deterministic: bool
) -> Backend:
    """deterministic: what the kernels are told, on which the answer hangs."""
    del deterministic
    chosen: Backend = "sdpa"
    reasons = []
    for backend in ("flash3", "flash2", "torch_flash"):
        if reason := _why_not(backend, device, dtype, alibi, drops, head_dim):
            reasons.append(reason)
        else:
            chosen = backend
            break
    tiled_runs = not _why_not("tiled", device, dtype, alibi, drops, head_dim)
    if chosen == "sdpa" and tiled_runs and cpu.tiles_are_fastest(dtype):
        chosen = "tiled"
    why = f"; {'; '.join(dict.fromkeys(reasons))}" if reasons else ""
    log.info("attention backend: %s (%s, %s%s)", chosen, device, dtype, why)
    return chosen


@torch._dynamo.assume_constant_result
def require_backend(
    backend: Backend,
    device: str,
    dtype: torch.dtype | None = None,
    alibi: bool = False,
    drops: bool = False,
    head_dim: int | None = None,
    place: str = "attention",
) -> None:
    """Raise ConfigError when a backend named in the config cannot run on a device type (with a dtype, if known), or
    cannot do what is asked of it (see choose_backend). place: of the attention in the config, for the message."""
    if reason := _why_not(backend, device, dtype, alibi, drops, head_dim):
        raise ConfigError(f"{place}.backend: {backend} cannot run: {reason}: use auto, or sdpa")


def _why_not(
    backend: str, device: str, dtype: torch.dtype | None, alibi: bool, drops: bool, head_dim: int | None
) -> str:
    if backend == "tiled":
        lacks = "ALiBi" if alibi else "dropout of attention weights" if drops else ""
        if device != "cpu":
            return f"the tiled kernel is for the CPU, not for {device}"
        return f"the tiled kernel has no {lacks}" if lacks else ""
    if backend not in _GPU:
        return ""
    name = {"flash3": "flash-attn 3", "torch_flash": "torch's packed flash attention", "flex": "FlexAttention"}
    if alibi and backend in ("flash3", "torch_flash"):
        return f"{name[backend]} has no ALiBi"
    if drops and backend != "flash2":
        return f"{name[backend]} has no dropout of attention weights"
    return gpu.why_not(backend, device, dtype, head_dim)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, window: Window, slopes: Tensor | None, dropout_p: float
) -> Tensor:
    """The reference: one dense (T, T) mask, every step spelt out, softmax in float32."""
    scores = torch.einsum("qnh,knh->nqk", q, k).float() / math.sqrt(q.shape[-1])
    if slopes is not None:
        scores = scores - slopes[:, None, None] * plan.dense_distance
    scores = scores.masked_fill(~plan.dense_visible(window), float("-inf"))
    probs = F.dropout(scores.softmax(-1), dropout_p) if dropout_p else scores.softmax(-1)
    return torch.einsum("nqk,knh->qnh", probs.to(v.dtype), v)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    window: Window,
    slopes: Tensor | None,
    dropout_p: float,
    wanted: Tensor | None = None,
) -> Tensor:
    """wanted: the tokens that q (M, N, H) is of, which then see whole sequences."""
    causal = _is_causal(window)
    whole = _is_global(plan, (window[0], window[0]) if causal else window)
    if q.device.type == "cpu" and cpu.prefers_float32(q.dtype) and (dropout_p or not whole):
        with torch.autocast("cpu", enabled=False):
            return _sdpa(q.float(), k.float(), v.float(), plan, window, slopes, dropout_p, wanted).to(q.dtype)
    if whole:
        return _sdpa_global(q, k, v, plan, slopes, dropout_p, wanted, causal)
    if not causal and window[0] != window[1]:
        raise ConfigError(
            f"attention: backend sdpa needs a window of two equal sides, or a right one of 0, got {window}"
        )
    return _sdpa_local(q, k, v, plan, window[0], slopes, dropout_p, causal)


def _is_causal(window: Window) -> bool:
    return window[1] == 0 and window[0] != 0


def _is_global(plan: AttentionPlan, window: Window) -> bool:
    """Whether each token sees its whole sequence: none may be longer than one side of the window."""
    return window == (-1, -1) or plan.max_seqlen <= min(window) + 1


def _sdpa_global(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    slopes: Tensor | None,
    dropout_p: float,
    wanted: Tensor | None,
    causal: bool,
) -> Tensor:
    """One call per bucket of sequences of similar length, padded to the bucket's longest. wanted: None where attention
    is causal."""
    buckets = plan.buckets
    asked = buckets if wanted is None else [plan.asked(number, wanted) for number in range(len(buckets))]
    parts = zip(_by_bucket(q, asked), _by_bucket(k, buckets), _by_bucket(v, buckets), strict=True)
    on_cpu = q.device.type == "cpu"
    mask_dtype = torch.float32 if on_cpu and cpu.prefers_float32(q.dtype) else q.dtype
    results = []
    for number, (queries, keys, values) in enumerate(parts):
        if not len(queries):
            continue
        bucket, of_queries = buckets[number], asked[number]
        # No token of a causal table sees its empty slots, which are the last.
        mask = None if causal else bucket.key_is_real
        if slopes is not None:
            mask = plan.alibi_bucket(number, slopes, mask_dtype, causal)
        queries, keys, values = _table(queries, of_queries), _table(keys, bucket), _table(values, bucket)
        table = (cpu.sdpa if on_cpu else _torch_sdpa)(queries, keys, values, mask, dropout_p, causal and slopes is None)
        table = table.transpose(1, 2).flatten(0, 1)
        results.append(table if of_queries.slots is None else table.index_select(0, of_queries.slots))
    order = _order(asked)
    return results[0] if order is None else spread_rows(torch.cat(results), order, len(q))


def _order(buckets: list[Bucket]) -> Tensor | None:
    """Packed indexes of the buckets' tokens, one after the other; None: as they are packed."""
    found = [bucket.tokens for bucket in buckets if bucket.tokens is not None]
    return torch.cat(found) if found else None


def _by_bucket(rows: Tensor, buckets: list[Bucket]) -> Sequence[Tensor]:
    """The rows (T, ...) of each bucket. All are moved at once: moved bucket by bucket, each has a gradient as large as
    all rows."""
    order = _order(buckets)
    if order is None:
        return (rows,)
    return rows.index_select(0, order).split([0 if bucket.tokens is None else len(bucket.tokens) for bucket in buckets])


def _table(rows: Tensor, bucket: Bucket) -> Tensor:
    """A bucket's rows (n, N, H) -> (B, N, L, H); a view where no slot is empty."""
    if bucket.slots is not None:
        rows = spread_rows(rows, bucket.slots, bucket.batch * bucket.length)
    return rows.unflatten(0, (bucket.batch, bucket.length)).transpose(1, 2)


def _sdpa_local(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    per_side: int,
    slopes: Tensor | None,
    dropout_p: float,
    causal: bool,
) -> Tensor:
    """Blocks of queries against the keys that their windows reach: O(T * window), across borders of sequences."""
    blocks = plan.blocks(per_side, causal)
    slots = blocks.count * blocks.block
    padded = q if slots == len(q) else F.pad(q, (0, 0, 0, 0, 0, slots - len(q)))
    query_blocks = padded.unflatten(0, (blocks.count, blocks.block)).transpose(1, 2)
    key_blocks, value_blocks = (
        _WindowBlocks.apply(x, blocks.count, blocks.block, per_side).transpose(1, 2)  # pyright: ignore
        for x in (k, v)
    )
    mask = plan.additive_visible(per_side, q.dtype, slopes, causal)
    out = _torch_sdpa(query_blocks, key_blocks, value_blocks, mask, dropout_p)
    return out.transpose(1, 2).flatten(0, 1)[: len(q)]


def _torch_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal)


class _WindowBlocks(torch.autograd.Function):
    """(T, N, H) -> (count, block + 2 * per_side, N, H): each block with its neighbourhood, as overlapping views of one
    padded copy. The generic gradient of such a view adds row by row; here it is three slices added in a fixed order,
    for blocks at least `per_side` wide."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, count: int, block: int, per_side: int) -> Tensor:
        ctx.sizes = (len(rows), block, per_side)
        padded = rows.new_empty(count * block + 2 * per_side, *rows.shape[1:])
        padded[per_side : per_side + len(rows)] = rows
        padded[:per_side], padded[per_side + len(rows) :] = 0, 0
        row = padded.stride(0)
        shape = (count, block + 2 * per_side, *rows.shape[1:])
        return padded.as_strided(shape, (block * row, row, *padded.stride()[1:]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        num_rows, block, per_side = ctx.sizes
        gradient = gradients[0]
        own = gradient[:, per_side : per_side + block].clone(memory_format=torch.contiguous_format)
        own[:-1, block - per_side :] += gradient[1:, :per_side]
        own[1:, :per_side] += gradient[:-1, per_side + block :]
        return own.flatten(0, 1)[:num_rows], None, None, None


KERNELS: dict[str, Callable[..., Tensor]] = {
    "eager": _eager,
    "sdpa": _sdpa,
    "tiled": cpu.tiled,
    "flash2": gpu.flash2,
    "flash3": gpu.flash3,
    "torch_flash": gpu.torch_flash,
    "flex": gpu.flex,
}
