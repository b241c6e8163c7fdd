"""Attention on the CPU as batched products, tile by tile.   T packed tokens, N heads, H head dim.

A tile is some queries of some heads against all keys they may see. Its scores stay in the cache between two products
and are made anew for the gradients, so memory grows with T, not with its square. In bfloat16, scores and weights of
attention are rounded to it, as wherever autocast runs attention as plain products; softmax and its gradient compute in
float32, sums over tiles are float32. A CPU without bfloat16 products computes in float32 what came in bfloat16.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexbert.kernels.cpu.products import lacks
from flexbert.kernels.plan import AttentionPlan

# Bytes of a tile's scores. On two cores of a Zen 4 in bfloat16, twice as many cost the same; with a quarter, a document
# of 8192 tokens costs 1.4 times as much.
TILE_BYTES = 2**22
_MIN_QUERIES = 64

_softmax_backward: Any = getattr(torch.ops.aten._softmax_backward_data, "out")  # noqa: B009  (unknown to the type checker)


@functools.cache
def tiles_are_fastest(dtype: torch.dtype) -> bool:
    """Whether tiles take less time than torch's own kernel: in bfloat16, where the CPU has fast products of which that
    kernel makes no use (AVX-512 without AMX; 0.89 of a training step on a Zen 4, 4 x 1024 tokens)."""
    has_products = torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
    return (
        dtype == torch.bfloat16 and has_products and not lacks(dtype, "cpu") and not torch.cpu._is_amx_tile_supported()
    )


def tiled(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, window: tuple[int, int], slopes: None, dropout_p: float
) -> Tensor:
    """See flexbert.kernels.attend: (T, N, H), as many key heads. slopes and dropout_p must be None and 0."""
    assert slopes is None
    assert dropout_p == 0.0
    per_side = window[0] if 0 <= window[0] < plan.max_seqlen - 1 else None
    causal = window[1] == 0 and window[0] != 0
    return _Tiled.apply(q, k, v, _Layout(plan, per_side, q.shape[1], causal))  # pyright: ignore[reportReturnType]


class _Rows(NamedTuple):
    """`count` matrices of `rows` rows in a table (rows, H): the first begins at `first`, the next `stride` later."""

    count: int
    rows: int
    stride: int
    first: int

    def of(self, table: Tensor) -> Tensor:
        """(count, rows, H), a view."""
        row, width = table.stride(0), table.shape[1]
        shape, strides = (self.count, self.rows, width), (self.stride * row, row, table.stride(1))
        return table.as_strided(shape, strides, table.storage_offset() + self.first * row)

    def add(self, table: Tensor, matrices: Tensor) -> None:
        """Add to the table where the matrices lie. Rows a stride apart may be the same: added by turns."""
        for offset in range(0, self.rows, self.stride):
            part = matrices[:, offset : offset + self.stride]
            self._replace(rows=part.shape[1], first=self.first + offset).of(table).add_(part)


class _Tile(NamedTuple):
    queries: _Rows
    keys: _Rows
    mask: Tensor | None  # 0 and -inf, (m, queries, keys); m divides the count of matrices


class _Layout:
    """Where the tiles of a batch lie in tables of (margin + N * length + margin, H), head after head."""

    def __init__(self, plan: AttentionPlan, per_side: int | None, heads: int, causal: bool) -> None:
        """per_side: tokens seen to each side; None: whole sequences. causal: none of those to the right."""
        self.plan, self.per_side, self.heads, self.causal = plan, per_side, heads, causal
        self.length, self.margin = plan.num_tokens, 0
        if per_side is not None:
            blocks = plan.blocks(per_side, causal)
            self.length, self.margin = blocks.count * blocks.block, per_side

    def table(self, rows: Tensor, scale: float = 1.0) -> Tensor:
        """scale * (T, N, H) -> (margin + N * length + margin, H), zero where there is no token."""
        whole = rows.new_empty(self.heads * self.length + 2 * self.margin, rows.shape[-1])
        whole[: self.margin], whole[len(whole) - self.margin :] = 0, 0
        heads = self._heads(whole)
        heads[:, len(rows) :] = 0
        torch.mul(rows.transpose(0, 1), scale, out=heads[:, : len(rows)])
        return whole

    def rows(self, table: Tensor) -> Tensor:
        """The way back, a view (T, N, H)."""
        return self._heads(table)[:, : self.plan.num_tokens].transpose(0, 1)

    def _heads(self, table: Tensor) -> Tensor:
        return table[self.margin : len(table) - self.margin].unflatten(0, (self.heads, self.length))

    def tiles(self, dtype: torch.dtype) -> Iterator[_Tile]:
        """Every query is in one tile. Masks are of `dtype`."""
        return self._whole(dtype) if self.per_side is None else self._windows(dtype, self.per_side)

    def _whole(self, dtype: torch.dtype) -> Iterator[_Tile]:
        room = TILE_BYTES // dtype.itemsize
        for first, stop, mask in self.plan.runs(dtype):
            length = stop - first
            heads = max(1, min(self.heads, room // length**2))
            queries = min(length, max(_MIN_QUERIES, room // length))
            for head in range(0, self.heads, heads):
                count, start = min(heads, self.heads - head), head * self.length + first
                for query in range(0, length, queries):
                    number = min(queries, length - query)
                    part = None if mask is None else mask[:, query : query + number]
                    keys = length
                    if self.causal:  # keys behind the last query are left out
                        keys, triangle = query + number, self.plan.triangle(query, number, dtype)
                        part = triangle if part is None else part[:, :, :keys] + triangle
                    yield _Tile(
                        _Rows(count, number, self.length, start + query),
                        _Rows(count, keys, self.length, start),
                        part,
                    )

    def _windows(self, dtype: torch.dtype, per_side: int) -> Iterator[_Tile]:
        blocks = self.plan.blocks(per_side, self.causal)
        mask = self.plan.additive_visible(per_side, dtype, causal=self.causal).squeeze(1)
        width = blocks.block + 2 * per_side
        # Whole heads, or parts of one: the mask is the same for all.
        fit = max(1, TILE_BYTES // dtype.itemsize // (blocks.block * width))
        heads, part = max(1, fit // blocks.count), min(fit, blocks.count)
        for head in range(0, self.heads, heads):
            number = min(heads, self.heads - head)
            for block in range(0, blocks.count, part):
                count = number * min(part, blocks.count - block)
                start = (head * blocks.count + block) * blocks.block
                yield _Tile(
                    _Rows(count, blocks.block, blocks.block, self.margin + start),
                    _Rows(count, width, blocks.block, start),
                    mask[block : block + part],
                )


class _Tiled(torch.autograd.Function):
    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: _Layout) -> Tensor:
        # The scale on the queries, not on their scores: exact where H is a power of 4, else one rounding of its own.
        tables = layout.table(q, q.shape[-1] ** -0.5), layout.table(k), layout.table(v)
        ctx.save_for_backward(*tables)
        ctx.layout = layout
        queries, keys, values = map(_factor, tables)
        out = torch.empty_like(queries)
        for tile in layout.tiles(queries.dtype):
            probs, place = _probabilities(tile, queries, keys), tile.queries.of(out)
            if place.is_contiguous():
                torch.bmm(probs, tile.keys.of(values), out=place)
            else:
                place.copy_(torch.bmm(probs, tile.keys.of(values)))
        return layout.rows(out).to(q.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        layout: _Layout = ctx.layout
        dtype = gradients[0].dtype
        queries, keys, values = map(_factor, ctx.saved_tensors)
        out_gradient = _factor(layout.table(gradients[0]))
        query_gradient = torch.empty_like(queries)
        key_gradient, value_gradient = (torch.zeros_like(keys, dtype=torch.float32) for _ in range(2))
        for tile in layout.tiles(queries.dtype):
            probs = _probabilities(tile, queries, keys)
            gradient = tile.queries.of(out_gradient)
            tile.keys.add(value_gradient, torch.bmm(probs.transpose(1, 2), gradient))
            scores = torch.bmm(gradient, tile.keys.of(values).transpose(1, 2))
            # Each row of the first is read as a whole before it is overwritten
            _softmax_backward(scores, probs, -1, scores.dtype, grad_input=scores)
            tile.queries.of(query_gradient).copy_(torch.bmm(scores, tile.keys.of(keys)))
            tile.keys.add(key_gradient, torch.bmm(scores.transpose(1, 2), tile.queries.of(queries)))
        query_gradient.mul_(queries.shape[-1] ** -0.5)
        found = (layout.rows(table).to(dtype) for table in (query_gradient, key_gradient, value_gradient))
        return *found, None


def _factor(table: Tensor) -> Tensor:
    return table.float() if lacks(table.dtype, "cpu") else table


def _probabilities(tile: _Tile, queries: Tensor, keys: Tensor) -> Tensor:
    """softmax(q k + mask): (count, queries, keys)."""
    rows, columns = tile.queries.of(queries), tile.keys.of(keys).transpose(1, 2)
    if tile.mask is None:
        scores = torch.bmm(rows, columns)
    else:
        scores = queries.new_empty(len(rows), rows.shape[1], columns.shape[2])
        scores.unflatten(0, (-1, len(tile.mask))).copy_(tile.mask)
        scores.baddbmm_(rows, columns)
    return torch.softmax(scores, -1, out=scores)
