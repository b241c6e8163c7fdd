"""What follows from the sequence lengths of a packed batch alone: made once per forward, used by all layers.

T packed tokens, B sequences in a bucket, L slots per sequence of a bucket.
"""

import itertools
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A sequence joins a bucket while it fills this share of its slots, or while the bucket is this short anyway:
# attention wastes at most 1/0.75^2, and a batch of any lengths up to 8192 makes about 20 buckets. On two CPU cores
# 0.6 to 0.85 cost the same within noise (512-token rows of mixed documents).
_BUCKET_FILL = 0.75
_SHORT = 32

# A run of short sequences is filled up to so many tokens: shorter products cost as much as masked ones of this size.
_RUN = 128

# Fewest queries per block of a sliding window: narrower blocks leave the matrix products too small.
_MIN_BLOCK = 64


class Bucket(NamedTuple):
    """Sequences of similar length, one per line of a (B, L) table."""

    batch: int
    length: int
    tokens: Tensor | None  # int64: packed index of each of the bucket's tokens; None: all, as they are packed
    slots: Tensor | None  # int64: index of each in the flattened table; None: they fill it
    key_is_real: Tensor | None  # (B, 1, 1, L) bool, None when no slot is empty


class Blocks(NamedTuple):
    """The batch cut into blocks of queries, each beside the keys its window can reach."""

    count: int
    block: int  # queries per block
    per_side: int  # keys left and right of the block
    visible: Tensor  # (count, 1, block, block + 2 * per_side) bool


class AttentionPlan:
    """Index plans of one packed batch. Each is made when a kernel first asks for it."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, num_tokens: int, causal: bool = False) -> None:
        """cu_seqlens: (num_seqs + 1,) int32. num_tokens: its last entry, known to the caller without a sync. causal:
        whether attention sees nothing to the right of a token."""
        self.cu_seqlens, self.max_seqlen, self.num_tokens, self.causal = cu_seqlens, max_seqlen, num_tokens, causal
        self.longest = torch.tensor(max_seqlen, device="cpu")
        """max_seqlen as an int64 scalar in host memory: compiled code holds no number that changes with each batch."""
        self.flex_masks: dict[tuple[int, int], Any] = {}  # of gpu.py, by window
        self._runs: dict[torch.dtype, list[tuple[int, int, Tensor | None]]] = {}
        self._blocks: dict[tuple[int, bool], Blocks] = {}
        self._additive: dict[tuple[int, torch.dtype, bool, bool], Tensor] = {}
        self._alibi: dict[tuple[int, torch.dtype, bool], Tensor] = {}
        self._triangles: dict[tuple[int, int, torch.dtype], Tensor] = {}

    @cached_property
    def sequence_ids(self) -> Tensor:
        """(T,) int64: which sequence each token belongs to."""
        lengths = self.cu_seqlens.diff()
        numbers = torch.arange(len(lengths), device=lengths.device)
        return numbers.repeat_interleave(lengths, output_size=self.num_tokens)

    @cached_property
    def position_ids(self) -> Tensor:
        """(T,) int64, restarting at 0 in each sequence."""
        starts = self.cu_seqlens[:-1].long().index_select(0, self.sequence_ids)
        return torch.arange(self.num_tokens, device=self.cu_seqlens.device) - starts

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The sequences by length; empty ones are in no bucket. Cost: one host sync."""
        device = self.cu_seqlens.device
        bounds = self.cu_seqlens.cpu().long()
        lengths, order = bounds.diff().sort(descending=True, stable=True)
        starts = bounds[:-1][order]
        # Slices of the sorted lengths: 0 .. first cut, first cut .. second cut, ...
        cuts: list[int] = [0]
        values = lengths.tolist()
        count = sum(value > 0 for value in values)
        for number in range(1, count):
            longest = values[cuts[-1]]
            if longest > _SHORT and values[number] < _BUCKET_FILL * longest:
                cuts.append(number)
        cuts.append(count)
        buckets = []
        for first, last in itertools.pairwise(cuts):
            if last > first:
                buckets.append(_bucket(starts[first:last], lengths[first:last], self.num_tokens, device))
        return buckets

    def asked(self, number: int, wanted: Tensor) -> Bucket:
        """Some of the queries of a bucket, in a table of as many lines, or of length 0 where it has none of them.

        wanted: (M,) int64, packed indexes, rising. `tokens` of the result are places in `wanted`. Cost: host syncs.
        """
        bucket, places = self.buckets[number], None
        if bucket.tokens is None:  # and no slot is empty
            lines = wanted // bucket.length
        else:
            slots = torch.arange(len(bucket.tokens), device=wanted.device) if bucket.slots is None else bucket.slots
            slots = torch.full((self.num_tokens,), -1, device=wanted.device).index_copy_(0, bucket.tokens, slots)
            slots = slots.index_select(0, wanted)
            places = (slots >= 0).nonzero().squeeze(1)
            lines, order = (slots.index_select(0, places) // bucket.length).sort(stable=True)
            places = places.index_select(0, order)
        counts = lines.bincount(minlength=bucket.batch)
        length = int(counts.max())
        within = torch.arange(len(lines), device=wanted.device) - (counts.cumsum(0) - counts).index_select(0, lines)
        return Bucket(bucket.batch, length, places, lines * length + within, None)

    def runs(self, dtype: torch.dtype) -> list[tuple[int, int, Tensor | None]]:
        """The tokens cut between sequences: (first, stop, mask), one sequence or several short ones in a run.

        mask: (1, L, L) of `dtype`, 0 within a sequence and -inf across; None for one sequence. Cost: one host sync.
        """
        if dtype not in self._runs:
            self._runs[dtype] = []
            for first, stop, several in self._run_bounds:
                mask = None
                if several:
                    ids = self.sequence_ids[first:stop]
                    mask = torch.zeros((), dtype=dtype, device=ids.device)
                    mask = torch.where(ids[:, None] == ids[None, :], mask, float("-inf")).unsqueeze(0)
                self._runs[dtype].append((first, stop, mask))
        return self._runs[dtype]

    def triangle(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """(1, count, first + count) of `dtype`: of so many queries from the first on, 0 where a key is not behind the
        query and -inf where it is."""
        key = (first, count, dtype)
        if key not in self._triangles:
            places = torch.arange(first + count, device=self.cu_seqlens.device)
            mask = torch.zeros((), dtype=dtype, device=places.device)
            self._triangles[key] = torch.where(places <= places[first:, None], mask, float("-inf")).unsqueeze(0)
        return self._triangles[key]

    def blocks(self, per_side: int, causal: bool = False) -> Blocks:
        """Sliding-window blocks for `per_side` tokens to each side of self, of which the right one is not visible where
        attention is causal. They are at least `per_side` queries wide: a key is in three blocks at most."""
        key = (per_side, causal)
        if key not in self._blocks:
            self._blocks[key] = self._make_blocks(per_side, max(per_side, _MIN_BLOCK), causal)
        return self._blocks[key]

    def additive_visible(
        self, per_side: int, dtype: torch.dtype, slopes: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """`blocks(...).visible` as 0 and -inf: SDPA would convert a bool mask anew in every layer.

        slopes: (N,) float32 of ALiBi, one and the same for all calls on a plan: -slope * distance in place of the 0.
        """
        key = (per_side, dtype, slopes is not None, causal)
        if key not in self._additive:
            blocks = self.blocks(per_side, causal)
            mask = torch.zeros((), dtype=dtype, device=blocks.visible.device)
            if slopes is not None:
                places = torch.arange(blocks.block + 2 * per_side, device=blocks.visible.device)
                distance = places[None, :] - per_side - places[: blocks.block, None]
                mask = (-slopes[:, None, None] * distance.abs()).to(dtype)
            self._additive[key] = torch.where(blocks.visible, mask, float("-inf"))
        return self._additive[key]

    def alibi_bucket(self, number: int, slopes: Tensor, dtype: torch.dtype, causal: bool = False) -> Tensor:
        """(1 or B, N, L, L): -slope * distance in a bucket's table, -inf at its empty slots and, where attention is
        causal, behind the query. Quadratic in L.

        slopes: (N,) float32, one and the same for all calls on a plan.
        """
        key = (number, dtype, causal)
        if key not in self._alibi:
            bucket = self.buckets[number]
            places = torch.arange(bucket.length, device=slopes.device)
            distance = (places[None, :] - places[:, None]).abs()
            bias = (-slopes[:, None, None] * distance).to(dtype).unsqueeze(0)
            if bucket.key_is_real is not None and not causal:  # empty slots are the last
                bias = torch.where(bucket.key_is_real, bias, float("-inf"))
            if causal:
                bias = bias + self.triangle(0, bucket.length, dtype)
            self._alibi[key] = bias
        return self._alibi[key]

    @cached_property
    def dense_distance(self) -> Tensor:
        """(T, T) int64: |query - key|. Quadratic: for the eager reference only."""
        places = torch.arange(self.num_tokens, device=self.cu_seqlens.device)
        return (places[None, :] - places[:, None]).abs()

    def dense_visible(self, window_size: tuple[int, int]) -> Tensor:
        """(T, T) bool: query (row) sees key (column). Quadratic: for the eager reference only."""
        ids, (left, right) = self.sequence_ids, window_size
        visible = ids[:, None] == ids[None, :]
        places = torch.arange(self.num_tokens, device=ids.device)
        offset = places[None, :] - places[:, None]
        if left >= 0:
            visible = visible & (offset >= -left)
        if right >= 0:
            visible = visible & (offset <= right)
        return visible

    @cached_property
    def _run_bounds(self) -> list[tuple[int, int, bool]]:
        """First token, the one after the last, whether there is more than one sequence between them."""
        bounds = self.cu_seqlens.unique().tolist()  # without the empty ones
        runs: list[tuple[int, int, bool]] = []
        for first, stop in itertools.pairwise(bounds):
            if runs and stop - runs[-1][0] <= _RUN:
                runs[-1] = (runs[-1][0], stop, True)
            else:
                runs.append((first, stop, False))
        return runs

    def _make_blocks(self, per_side: int, block: int, causal: bool) -> Blocks:
        device = self.cu_seqlens.device
        count = -(-self.num_tokens // block)
        # Slots past the last token share the id -2: they see one another, so no query is left without any key.
        query_ids = torch.full((count * block,), -2, device=device)
        query_ids[: self.num_tokens] = self.sequence_ids
        key_ids = torch.full((count * block + 2 * per_side,), -1, device=device)
        key_ids[per_side : per_side + count * block] = query_ids
        width = block + 2 * per_side
        distance = torch.arange(width, device=device)[None, :] - torch.arange(block, device=device)[:, None]
        near = (distance >= 0) & (distance <= (per_side if causal else 2 * per_side))
        visible = query_ids.view(count, block, 1) == key_ids.unfold(0, width, block)[:count, None, :]
        return Blocks(count, block, per_side, (visible & near).unsqueeze(1))


def _bucket(starts: Tensor, lengths: Tensor, num_tokens: int, device: torch.device) -> Bucket:
    """Bucket of the sequences with these (non-zero) lengths, longest first; CPU tensors in, `device` tensors out."""
    batch, length, total = len(lengths), int(lengths[0]), int(lengths.sum())
    ragged = int(lengths[-1]) != length
    if not ragged and total == num_tokens:
        return Bucket(batch, length, None, None, None)
    firsts = lengths.cumsum(0) - lengths
    within = torch.arange(total) - firsts.repeat_interleave(lengths)
    tokens = (within + starts.repeat_interleave(lengths)).to(device)
    if not ragged:
        return Bucket(batch, length, tokens, None, None)
    length = -(-length // 8) * 8  # CUDA's memory-efficient kernel wants masks aligned to 8
    slots = within + (torch.arange(batch) * length).repeat_interleave(lengths)
    key_is_real = (torch.arange(length)[None, :] < lengths[:, None]).view(batch, 1, 1, length)
    return Bucket(batch, length, tokens, slots.to(device), key_is_real.to(device))
