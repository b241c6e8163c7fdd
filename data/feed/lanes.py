"""From the streams' lines to rows: a lane is an endless sequence of blocks, a block a packed set of documents.

A block takes from every stream, where the lane stands on it, the tokens that the mixture gives it; its documents are
shuffled and packed. Where a lane stands is a `LaneCursor`, a few integers. What a phase changes holds at once, and no
token is lost or repeated by it: when max_seq_len changes, the block's rest is packed anew; when the mixture changes,
the rest is put back and each stream's share of the next blocks comes from there first.
"""

import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.feed.order import DocumentList, Place, StreamLine, share_out
from data.feed.packing import SPECIAL_TOKENS_PER_SEQUENCE, Plan, Spans, pack
from data.keyed import keyed_generator

LongDocuments = Literal["split", "truncate", "drop"]


class Mixture(NamedTuple):
    """What a block is made of. Per stream: tokens it gives to a block on average, and the length below which it hides
    documents.

    room: tokens of a document at most, for `truncate` (its beginning is shown) and `drop` (it is not); else None.
    """

    tokens: tuple[float, ...]
    min_length: tuple[int, ...]
    long_documents: LongDocuments
    room: int | None

    @classmethod
    def of(
        cls, tokens: tuple[float, ...], min_length: tuple[int, ...], long_documents: LongDocuments, max_seq_len: int
    ) -> "Mixture":
        """The mixture of a phase with rows of max_seq_len slots."""
        room = None if long_documents == "split" else max_seq_len - SPECIAL_TOKENS_PER_SEQUENCE
        return cls(tokens, min_length, long_documents, room)

    def wanted(self, stream: int, block: int) -> int:
        """Tokens of a stream that a lane's `block` is to show: whole numbers whose sum keeps to the share."""
        return math.floor((block + 1) * self.tokens[stream]) - math.floor(block * self.tokens[stream])

    def shown(self, stream: int, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many tokens, from its first on, are shown of documents of these lengths, (n,) int64."""
        shown = np.where(lengths >= self.min_length[stream], lengths, 0)
        if self.room is None:
            return shown
        if self.long_documents == "drop":
            return np.where(shown > self.room, 0, shown)
        return np.minimum(shown, self.room)


class LaneCursor(NamedTuple):
    """Where a lane stands: at a block, and how many of its rows are taken.

    at: on each stream's line, where the block begins. taken: (max_seq_len, rows) taken from the block, in order.
    behind: a block whose rest was put back when the mixture changed; used: tokens per stream taken from that rest by
    the blocks since.
    """

    block: int = 0
    mixture: Mixture | None = None
    at: tuple[Place, ...] = ()
    taken: tuple[tuple[int, int], ...] = ()
    behind: "LaneCursor | None" = None
    used: tuple[int, ...] = ()

    def to_list(self) -> list[Any]:
        """JSON form."""
        return [
            self.block,
            self.mixture and [list(part) if isinstance(part, tuple) else part for part in self.mixture],
            [list(place) for place in self.at],
            [list(pair) for pair in self.taken],
            self.behind and self.behind.to_list(),
            list(self.used),
        ]

    @classmethod
    def from_list(cls, state: list[Any]) -> "LaneCursor":
        """What to_list gave."""
        block, mixture, at, taken, behind, used = state
        return cls(
            block,
            mixture and Mixture(tuple(mixture[0]), tuple(mixture[1]), mixture[2], mixture[3]),
            tuple(Place(*place) for place in at),
            tuple((length, rows) for length, rows in taken),
            behind and cls.from_list(behind),
            tuple(used),
        )


@dataclass(frozen=True)
class RowKey:
    """Names rows for ever: (lane, block, carry), and a row's number in the plan. carry tells a block's plans apart."""

    lane: int
    block: int
    carry: int


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of one plan: first to first + count."""

    documents: DocumentList
    plan: Plan
    key: RowKey
    first: int
    count: int

    def take(self, first: int, count: int) -> "Rows":
        """Rows first to first + count of these."""
        return replace(self, first=self.first + first, count=count)

    @property
    def pieces(self) -> Spans:
        """The rows' pieces, in order; their `document` is an index into `documents`."""
        starts = self.plan.row_starts
        return self.plan.pieces.take(slice(int(starts[self.first]), int(starts[self.first + self.count])))

    @property
    def sequences(self) -> NDArray[np.int64]:
        """Pieces of each row, (count,)."""
        return np.diff(self.plan.row_starts[self.first : self.first + self.count + 1])


@dataclass(frozen=True)
class _Block:
    documents: DocumentList
    spans: Spans
    after: tuple[Place, ...]  # where the next block begins
    used: tuple[int, ...]  # of what was put back, per stream
    left: tuple[DocumentList, Spans]  # of that, what neither this block nor those before it have taken


@dataclass
class _Planned:
    cursor: LaneCursor
    max_seq_len: int
    block: _Block
    plan: Plan
    carry: int = field(default=0)


class Lane:
    """An endless sequence of rows. Planning reads lengths only; a row's tokens are read by whoever needs them."""

    def __init__(
        self, lines: list[StreamLine], seed: int, lane: int, cursor: LaneCursor | None = None, packing: bool = True
    ) -> None:
        """packing: whether a row may hold several pieces of documents."""
        self.lines, self.seed, self.lane, self.packing = lines, seed, lane, packing
        self.cursor = cursor or LaneCursor()
        self._planned: _Planned | None = None
        self._rested: tuple[LaneCursor, tuple[DocumentList, Spans]] | None = None  # the last rest that was put back

    def take(self, rows: int, max_seq_len: int, mixture: Mixture) -> list[Rows]:
        """The next `rows` rows of max_seq_len slots; moves the cursor behind them."""
        if mixture != self.cursor.mixture:
            self._change(mixture)
        taken: list[Rows] = []
        while rows > 0:
            planned = self._plan(max_seq_len, mixture)
            before = self._before(max_seq_len)
            first = self.cursor.taken[len(before)][1] if len(self.cursor.taken) > len(before) else 0
            count = min(rows, planned.plan.num_rows - first)
            if count:
                key = RowKey(self.lane, self.cursor.block, planned.carry)
                taken.append(Rows(planned.block.documents, planned.plan, key, first, count))
            rows -= count
            if first + count == planned.plan.num_rows:
                self.cursor = self._next(planned.block)
            else:
                self.cursor = self.cursor._replace(taken=(*before, (max_seq_len, first + count)))
        return taken

    def prefetch(self, mixture: Mixture) -> None:
        """Announce the shards of the lane's next two blocks."""
        for number, line in enumerate(self.lines):
            place = self.cursor.at[number] if self.cursor.at else Place()
            line.stream.prefetch(line.upcoming_shards(self.lane, place, 2 * math.ceil(mixture.tokens[number])))

    def _change(self, mixture: Mixture) -> None:
        """Put back what is left of the block, and begin one of the new mixture."""
        old = self.cursor
        nothing = (0,) * len(self.lines)
        if old.mixture is None:
            self.cursor = LaneCursor(0, mixture, tuple(Place() for _ in self.lines), (), None, nothing)
        elif not old.taken:
            self.cursor = old._replace(mixture=mixture)
        else:
            self.cursor = LaneCursor(old.block + 1, mixture, self._block(old).after, (), old, nothing)

    def _next(self, block: _Block) -> LaneCursor:
        nothing_left = len(block.left[1]) == 0
        behind, used = (None, (0,) * len(self.lines)) if nothing_left else (self.cursor.behind, block.used)
        return LaneCursor(self.cursor.block + 1, self.cursor.mixture, block.after, (), behind, used)

    def _before(self, max_seq_len: int) -> tuple[tuple[int, int], ...]:
        """The cursor's `taken` less a last entry of this very length."""
        taken = self.cursor.taken
        return taken[:-1] if taken and taken[-1][0] == max_seq_len else taken

    def _plan(self, max_seq_len: int, mixture: Mixture) -> _Planned:
        """The plan of the current block's rest at this length."""
        before = self._before(max_seq_len)
        place = self.cursor._replace(taken=before)
        if self._planned is None or (self._planned.cursor, self._planned.max_seq_len) != (place, max_seq_len):
            self.prefetch(mixture)
            block = self._block(place)
            plan = self._pack(block, self._rest(block, place), max_seq_len, place.block, before)
            self._planned = _Planned(place, max_seq_len, block, plan, _carry_key(before, max_seq_len))
        return self._planned

    def _rest(self, block: _Block, cursor: LaneCursor) -> Spans:
        """The block's spans less the rows taken."""
        spans = block.spans
        for depth, (length, rows) in enumerate(cursor.taken):
            spans = self._pack(block, spans, length, cursor.block, cursor.taken[:depth]).remaining(rows)
        return spans

    def _pack(
        self, block: _Block, spans: Spans, max_seq_len: int, number: int, before: tuple[tuple[int, int], ...]
    ) -> Plan:
        rng = keyed_generator(self.seed, "rows", self.lane, number, _carry_key(before, max_seq_len))
        return pack(spans, max_seq_len, rng, block.documents.stream, self.packing)

    def _block(self, cursor: LaneCursor) -> _Block:
        """Documents and spans of the cursor's block, whatever was taken of it."""
        if self._planned is not None and self._planned.cursor._replace(taken=()) == cursor._replace(taken=()):
            return self._planned.block
        assert cursor.mixture is not None
        lists, spans, after, used = [], [], [], []
        put_back = self._put_back(cursor.behind)
        for number, line in enumerate(self.lines):

            def shown(lengths: NDArray[np.int64], stream: int = number) -> NDArray[np.int64]:
                return cursor.mixture.shown(stream, lengths)  # pyright: ignore[reportOptionalMemberAccess]

            place = cursor.at[number]
            if cursor.mixture.tokens[number] == 0:  # not even what it was owed when it was in the mixture
                after.append(place)
                used.append(cursor.used[number])
                continue
            wanted = cursor.mixture.wanted(number, cursor.block)
            cut = cursor.mixture.long_documents == "split"
            old, old_spans, passed, reached = _from_rest(
                *put_back, number, cursor.used[number], wanted - place.owed, shown, cut
            )
            owed = place.owed + int((old_spans.stop - old_spans.start).sum())
            lists.append(old)
            spans.append(old_spans)
            if reached:
                place = place._replace(owed=owed - wanted)
            else:
                documents, start, stop, place = line.take(self.lane, place._replace(owed=owed), wanted, shown, cut)
                lists.append(documents)
                spans.append(Spans(np.arange(len(start)), start, stop))
            after.append(place)
            used.append(passed)
        documents = DocumentList.join(lists)
        shuffle = keyed_generator(self.seed, "documents", self.lane, cursor.block).permutation(len(documents.length))
        start, stop = (np.concatenate([getattr(part, edge) for part in spans]) for edge in _SPAN[1:])
        whole = Spans(np.arange(len(shuffle)), start[shuffle], stop[shuffle])
        left = (put_back[0], _unused(*put_back, used))
        return _Block(documents.take(shuffle), whole, tuple(after), tuple(used), left)

    def _put_back(self, behind: LaneCursor | None) -> tuple[DocumentList, Spans]:
        """The documents and spans of a block's rest. What a stream that left the mixture had in it stays behind every
        later block, so it is planned once and kept."""
        if behind is None:
            nothing = np.zeros(0, np.int64)
            return DocumentList.join([]), Spans(nothing, nothing, nothing)
        if self._rested is None or self._rested[0] != behind:
            block = self._block(behind)
            rest, (left, left_spans) = self._rest(block, behind), block.left
            more = Spans(left_spans.document + len(block.documents.length), left_spans.start, left_spans.stop)
            spans = Spans(*(np.concatenate([getattr(part, key) for part in (rest, more)]) for key in _SPAN))
            kept, places = np.unique(spans.document, return_inverse=True)
            documents = DocumentList.join([block.documents, left]).take(kept)
            self._rested = behind, (documents, Spans(places, spans.start, spans.stop))
        return self._rested[1]


_SPAN = ("document", "start", "stop")


def _from_rest(
    documents: DocumentList, spans: Spans, stream: int, used: int, wanted: int, shown: Any, cut: bool
) -> tuple[DocumentList, Spans, int, bool]:
    """A stream's next spans of a put-back rest: their documents (one for each span), the spans, tokens of the rest now
    used, and whether they make up what is wanted. Spans that the mixture hides are passed over."""
    own = spans.take(documents.stream[spans.document] == stream)
    size = own.stop - own.start
    begins = np.cumsum(size) - size
    start = own.start + np.clip(used - begins, 0, size)
    stop = np.minimum(own.stop, shown(documents.length[own.document]))
    counted = np.maximum(stop - start, 0)
    if wanted <= 0:
        whole, piece, reached = 0, 0, True
    else:
        whole, piece, reached = share_out(counted, wanted, cut)
        behind = int(begins[whole] if whole < len(own) else size.sum())
        used = max(used, behind + (int(start[whole] - own.start[whole]) + piece if piece else 0))
    stop[whole : whole + 1] = start[whole : whole + 1] + piece
    kept = np.flatnonzero(stop[: whole + (piece > 0)] > start[: whole + (piece > 0)])
    return documents.take(own.document[kept]), Spans(np.arange(len(kept)), start[kept], stop[kept]), used, reached


def _unused(documents: DocumentList, spans: Spans, used: list[int]) -> Spans:
    """What is left of a rest of which `used` tokens per stream were taken."""
    kept: list[Spans] = [spans.take(slice(0))]
    for stream, count in enumerate(used):
        own = spans.take(documents.stream[spans.document] == stream)
        size = own.stop - own.start
        start = own.start + np.clip(count - np.cumsum(size) + size, 0, size)
        kept.append(Spans(own.document, start, own.stop).take(start < own.stop))
    return Spans(*(np.concatenate([getattr(part, key) for part in kept]) for key in _SPAN))


def _carry_key(before: tuple[tuple[int, int], ...], max_seq_len: int) -> int:
    """One number for a plan of a block: what was taken before it, and its row length."""
    return int.from_bytes(hashlib.blake2b(repr((before, max_seq_len)).encode(), digest_size=8).digest())
