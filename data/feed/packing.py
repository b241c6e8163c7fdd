"""Packing as a plan computed from lengths: spans of documents -> pieces -> rows.

A span is a run of tokens [start, stop) of a document. Spans are cut into pieces of at most max_seq_len - 2 tokens
(each piece becomes a sequence: [CLS] piece [SEP]); pieces go best-fit-decreasing into rows of max_seq_len slots.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

SPECIAL_TOKENS_PER_SEQUENCE = 2  # [CLS] and [SEP]
_GROUP_BITS = 6  # remaining-space buckets are searched in groups of 64
_CANDIDATES = 64  # rows looked at for the next place of an order of even shares


@dataclass(frozen=True)
class Spans:
    """Token runs of documents: `document` is an index into the block's documents. All (n,) int64; stop > start."""

    document: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.document)

    def take(self, which: slice | NDArray[Any]) -> "Spans":
        """The spans at these positions."""
        return Spans(self.document[which], self.start[which], self.stop[which])


@dataclass(frozen=True)
class Plan:
    """Rows of pieces. Row r holds pieces row_starts[r] to row_starts[r + 1]."""

    pieces: Spans
    row_starts: NDArray[np.int64]
    max_seq_len: int

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1

    def row(self, index: int) -> Spans:
        """The row's pieces."""
        return self.pieces.take(slice(int(self.row_starts[index]), int(self.row_starts[index + 1])))

    def remaining(self, first_row: int) -> Spans:
        """The tokens of rows first_row and later, adjacent pieces of a document joined again, in document order."""
        tail = self.pieces.take(slice(int(self.row_starts[first_row]), None))
        tail = tail.take(np.lexsort((tail.start, tail.document)))
        begins = np.ones(len(tail), bool)
        begins[1:] = (tail.document[1:] != tail.document[:-1]) | (tail.start[1:] != tail.stop[:-1])
        ends = np.append(begins[1:], True)[: len(tail)]
        return Spans(tail.document[begins], tail.start[begins], tail.stop[ends])


def cut(spans: Spans, max_seq_len: int) -> Spans:
    """Cut spans into pieces of at most max_seq_len - 2 tokens: full ones first, the remainder last."""
    room = max_seq_len - SPECIAL_TOKENS_PER_SEQUENCE
    count = -(-(spans.stop - spans.start) // room)
    total = int(count.sum())
    if total == len(count):
        return spans
    first = np.cumsum(count) - count
    nth = np.arange(total) - np.repeat(first, count)
    start = np.repeat(spans.start, count) + nth * room
    return Spans(np.repeat(spans.document, count), start, np.minimum(start + room, np.repeat(spans.stop, count)))


@numba.njit(cache=True)
def _best_fit(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], int]:
    """Row of each piece, and the number of rows. Pieces are visited by decreasing length, equal ones in order.

    Open rows hang in linked lists by remaining space; a piece goes to the fullest row that still takes it.
    """
    count = len(lengths)
    place = np.zeros(capacity + 2, np.int64)
    for length in lengths:
        place[capacity - length + 1] += 1
    place = np.cumsum(place)
    order = np.empty(count, np.int64)
    for piece in range(count):
        bucket = capacity - lengths[piece]
        order[place[bucket]] = piece
        place[bucket] += 1
    head = np.full(capacity + 1, -1, np.int64)
    group = np.zeros((capacity >> _GROUP_BITS) + 1, np.int64)  # open rows per 64 buckets: skips empty stretches
    next_row = np.empty(count, np.int64)
    row_of = np.empty(count, np.int64)
    num_rows = 0
    for piece in order:
        need = lengths[piece]
        space = need
        while space <= capacity and head[space] < 0:
            space += 1
            if space & ((1 << _GROUP_BITS) - 1) == 0:
                while space <= capacity and group[space >> _GROUP_BITS] == 0:
                    space += 1 << _GROUP_BITS
        if space > capacity:
            row, space = num_rows, capacity
            num_rows += 1
        else:
            row = head[space]
            head[space] = next_row[row]
            group[space >> _GROUP_BITS] -= 1
        row_of[piece] = row
        left = space - need
        next_row[row] = head[left]
        head[left] = row
        group[left >> _GROUP_BITS] += 1
    return row_of, num_rows


@numba.njit(cache=True)
def _even_order(
    row_of: NDArray[np.int64],
    lengths: NDArray[np.int64],
    kind: NDArray[np.int64],
    kinds: int,
    shuffled: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Places of the rows, close to the `shuffled` order, at which every stretch holds the kinds in the block's shares.

    Each place takes, of the next few rows in shuffled order, the one that keeps the tokens of each kind so far
    closest to the block's proportions (greedy vector balancing).
    """
    num_rows = len(shuffled)
    share = np.zeros((num_rows, kinds), np.float64)
    for piece in range(len(row_of)):
        share[row_of[piece], kind[piece]] += lengths[piece]
    mean = np.zeros(kinds, np.float64)
    for row in range(num_rows):
        for k in range(kinds):
            mean[k] += share[row, k]
    mean /= num_rows
    waiting = np.empty(_CANDIDATES, np.int64)
    waits = min(_CANDIDATES, num_rows)
    waiting[:waits] = shuffled[:waits]
    taken = waits
    debt = np.zeros(kinds, np.float64)
    position = np.empty(num_rows, np.int64)
    for place in range(num_rows):
        best, best_cost = 0, np.inf
        for candidate in range(waits):
            cost = 0.0
            for k in range(kinds):
                off = debt[k] + share[waiting[candidate], k] - mean[k]
                cost += off * off
            if cost < best_cost:
                best, best_cost = candidate, cost
        row = waiting[best]
        position[row] = place
        for k in range(kinds):
            debt[k] += share[row, k] - mean[k]
        if taken < num_rows:
            waiting[best] = shuffled[taken]
            taken += 1
        else:
            waits -= 1
            waiting[best] = waiting[waits]
    return position


@numba.njit(cache=True)
def _group(row_of: NDArray[np.int64], num_rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pieces sorted by row, and where each row starts, (num_rows + 1,)."""
    starts = np.zeros(num_rows + 1, np.int64)
    for row in row_of:
        starts[row + 1] += 1
    starts = np.cumsum(starts)
    fill = starts[:-1].copy()
    order = np.empty(len(row_of), np.int64)
    for piece in range(len(row_of)):
        row = row_of[piece]
        order[fill[row]] = piece
        fill[row] += 1
    return order, starts


def pack(
    spans: Spans,
    max_seq_len: int,
    rng: np.random.Generator,
    kind: NDArray[np.int64] | None = None,
    together: bool = True,
) -> Plan:
    """Pack spans into rows of max_seq_len slots, best-fit-decreasing; the rows come in an order drawn from `rng`.

    kind: (documents,) int64, a small number per document (its stream); rows are then ordered so that every run of rows
    holds the kinds in nearly the proportions of the whole. together: whether a row may hold several pieces. An empty
    input gives zero rows. Cost: O(pieces), about 0.1 us each. Source of the method: best-fit-decreasing bin packing
    (Johnson 1973); for sequence packing see Krell et al. 2021, arXiv 2107.02027.
    """
    pieces = cut(spans, max_seq_len)
    lengths = pieces.stop - pieces.start + SPECIAL_TOKENS_PER_SEQUENCE
    row_of, num_rows = _best_fit(lengths, max_seq_len) if together else (np.arange(len(pieces)), len(pieces))
    shuffled = rng.permutation(num_rows)
    kinds = 1 if kind is None or len(kind) == 0 else int(kind.max()) + 1
    if kind is not None and kinds > 1:
        position = _even_order(row_of, lengths, kind[pieces.document], kinds, shuffled)
    else:
        position = shuffled
    order, row_starts = _group(position[row_of], num_rows)
    return Plan(pieces.take(order), row_starts, max_seq_len)
