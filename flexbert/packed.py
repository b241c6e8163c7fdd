"""Packed and padded layouts: the only place that knows about padding.   B batch, S seq, T packed tokens."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """Sequences laid end to end."""

    input_ids: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (num_seqs + 1,) int32: starts of the sequences, then T
    max_seqlen: int  # tokens of the longest sequence
    slots: Tensor  # (T,) int64: where each token was in the flattened padded batch


def unpad(input_ids: Tensor, attention_mask: Tensor) -> Packed:
    """Lay the real tokens of a padded batch (B, S) end to end, row by row; an empty row gives a sequence of length 0.

    attention_mask: bool or 0/1, true where the token is real; need not be a prefix of the row.
    Raises ValueError when the shapes differ, and for a mask of other values: an additive one (0 and -inf) would be read
    the wrong way round. Cost: host syncs, so once per batch, never in a layer.
    """
    if input_ids.ndim != 2 or input_ids.shape != attention_mask.shape:
        raise ValueError(
            f"expected input_ids and attention_mask of one shape (batch, seq), got {tuple(input_ids.shape)} and "
            f"{tuple(attention_mask.shape)}"
        )
    real = attention_mask.bool()
    if attention_mask.dtype != torch.bool and bool((differs := attention_mask != real).any()):
        raise ValueError(
            f"attention_mask: holds {attention_mask[differs][0].item():g}: expected 1 (or true) where a token is real "
            "and 0 elsewhere, neither an additive mask nor numbers of sequences"
        )
    lengths = real.sum(1)
    slots = real.flatten().nonzero().squeeze(1)
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=input_ids.device)
    cu_seqlens[1:] = lengths.cumsum(0)
    max_seqlen = int(lengths.max()) if len(lengths) else 0
    return Packed(input_ids.flatten().index_select(0, slots), cu_seqlens, max_seqlen, slots)


def pad(hidden_states: Tensor, slots: Tensor, batch: int, seq: int) -> Tensor:
    """Undo `unpad` for (T, ...) states: (batch, seq, ...), zero where there was no token."""
    return spread_rows(hidden_states, slots, batch * seq).unflatten(0, (batch, seq))


def check_packed(input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    """Raise ValueError for inputs that are not a packed batch. Values are looked at on the CPU only (no sync)."""
    if input_ids.ndim != 1 or input_ids.dtype != torch.int64:
        raise ValueError(f"expected input_ids (total_tokens,) int64, got {tuple(input_ids.shape)} {input_ids.dtype}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"expected cu_seqlens (num_seqs + 1,) int32, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
    if cu_seqlens.device.type == "cpu":
        first, last, lengths = int(cu_seqlens[0]), int(cu_seqlens[-1]), cu_seqlens.diff()
        if first != 0 or last != len(input_ids) or bool((lengths < 0).any()):
            raise ValueError(f"expected cu_seqlens to rise from 0 to {len(input_ids)} tokens, got {first} to {last}")
        if len(lengths) and (longest := int(lengths.max())) > max_seqlen:
            raise ValueError(f"expected max_seqlen to be that of the longest sequence, {longest}, got {max_seqlen}")


def check_wanted(wanted: Tensor, num_tokens: int) -> None:
    """Raise ValueError unless these are places of tokens, each once and rising. Values are looked at on the CPU only
    (no sync)."""
    if wanted.ndim != 1 or wanted.dtype != torch.int64:
        raise ValueError(f"expected wanted (num_wanted,) int64, got {tuple(wanted.shape)} {wanted.dtype}")
    if wanted.device.type == "cpu" and len(wanted):
        places = wanted.numpy()
        if places[0] < 0 or places[-1] >= num_tokens or (places[1:] <= places[:-1]).any():
            raise ValueError(
                f"expected wanted to rise within 0 to {num_tokens - 1}, each token once: sort and dedupe it"
            )


def round_up(wanted: Tensor, num_tokens: int) -> Tensor:
    """The tokens `wanted`, (M,) int64 and rising, and others spread among them, up to the next sixteenth of the batch:
    so compiled code meets few sizes. Rising; no sync."""
    step = max(1, num_tokens // 16)
    more = min(-(-len(wanted) // step) * step, num_tokens) - len(wanted)
    if not more:
        return wanted
    is_other = torch.ones(num_tokens, dtype=torch.bool, device=wanted.device).index_fill_(0, wanted, False)
    others = is_other.argsort(descending=True, stable=True)
    spread = torch.arange(more, device=wanted.device) * (num_tokens - len(wanted)) // more
    return torch.cat((wanted, others.index_select(0, spread))).sort().values


class _SpreadRows(torch.autograd.Function):
    """Torch's index_copy keeps the rows for its gradient, which needs their shape only: a fifth of all that a step on
    sequences of several lengths keeps."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return rows.new_zeros(num_rows, *rows.shape[1:]).index_copy_(0, index, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return gradients[0].index_select(0, index), None, None


def spread_rows(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """`num_rows` rows, zero but for out[index] = rows; `index` (int64) must not repeat an entry."""
    return _SpreadRows.apply(rows, index, num_rows)  # pyright: ignore[reportReturnType]
