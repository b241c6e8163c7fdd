"""The order of documents is arithmetic: which documents block b of epoch e holds is a function of (seed, e, b).

A *part* is a run of consecutive documents of one shard. An epoch deals every stream's parts, shuffled, evenly over
its *blocks* (so each block has the mixture's proportions) and shuffles the documents of a block. Block b belongs to
*lane* b mod L; a lane is an endless sequence of rows, and where it stands is a `LaneCursor`: a few integers.
Memory grows with the number of parts, never with the number of documents.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.keyed import keyed_generator
from data.masking import RowKey
from data.packing import Plan, Spans, pack
from data.shards import Stream
from schema import ConfigError

_PARTS_PER_BLOCK = 4  # at least, per stream, where it has the documents: keeps every block at the mixture's proportions


@dataclass(frozen=True)
class BlockDocuments:
    """The documents of one block in shuffled order: stream, shard and index in the shard, each (n,) int64."""

    stream: NDArray[np.int64]
    shard: NDArray[np.int64]
    index: NDArray[np.int64]


class MixtureOrder:
    """Deals the documents of several streams into the blocks of endless epochs."""

    def __init__(
        self,
        streams: list[Stream],
        repeats: list[float],
        seed: int,
        lanes: int,
        part_documents: int,
        block_documents: int,
    ) -> None:
        """repeats: how often an epoch shows each stream; a fraction shows that share of its parts, others next epoch.

        Raises ConfigError when there are fewer documents than lanes.
        """
        self.streams, self.repeats, self.seed, self.lanes = streams, repeats, seed, lanes
        documents = sum(stream.manifest.documents * repeat for stream, repeat in zip(streams, repeats, strict=True))
        if documents < lanes:
            found = f"an epoch of {documents:.0f} documents cannot fill {lanes} lanes"
            raise ConfigError(f"data: {found}: add data, or set data.lanes lower")
        self.num_blocks = lanes * max(1, round(documents / block_documents / lanes))
        self._parts = [self._cut_parts(stream, part_documents) for stream in streams]
        self._epochs: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()

    def _cut_parts(self, stream: Stream, part_documents: int) -> NDArray[np.int64]:
        """(parts, 3): shard, first document, count; parts of a shard differ by at most one document."""
        size = min(part_documents, max(1, stream.manifest.documents // (_PARTS_PER_BLOCK * self.num_blocks)))
        rows = []
        for shard, info in enumerate(stream.manifest.shards):
            if info.documents:
                edges = np.linspace(0, info.documents, -(-info.documents // size) + 1).astype(np.int64)
                rows.append(np.stack([np.full(len(edges) - 1, shard), edges[:-1], np.diff(edges)], axis=1))
        return np.concatenate(rows) if rows else np.zeros((0, 3), np.int64)

    def _appearances(self, stream: int, epoch: int) -> NDArray[np.int64]:
        """Part indices of a stream in this epoch, shuffled. Over epochs each part appears `repeat` times an epoch."""
        count, repeat = len(self._parts[stream]), self.repeats[stream]
        # Stratified offsets: in every epoch floor(count * repeat) or one more parts appear, and each in its turn.
        offset = (keyed_generator(self.seed, "turn", stream).permutation(count) + 0.5) / max(count, 1)
        times = np.floor((epoch + 1) * repeat + offset) - np.floor(epoch * repeat + offset)
        parts = np.repeat(np.arange(count), times.astype(np.int64))
        return keyed_generator(self.seed, "parts", stream, epoch).permutation(parts)

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(appearances, 2) stream and part sorted by block, and where each block starts, (num_blocks + 1,)."""
        if epoch not in self._epochs:
            rows, blocks = [], []
            for stream in range(len(self.streams)):
                parts = self._appearances(stream, epoch)
                shift = keyed_generator(self.seed, "shift", stream, epoch).random()
                blocks.append(((np.arange(len(parts)) + shift) * self.num_blocks / max(len(parts), 1)).astype(np.int64))
                rows.append(np.stack([np.full(len(parts), stream), parts], axis=1))
            block = np.concatenate(blocks)
            order = np.argsort(block, kind="stable")
            starts = np.searchsorted(block[order], np.arange(self.num_blocks + 1))
            self._epochs[epoch] = (np.concatenate(rows)[order], starts)
            while len(self._epochs) > 2:  # lanes drift apart by less than an epoch
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def block(self, epoch: int, block: int) -> BlockDocuments:
        """The block's documents; may be empty when the data is small."""
        appearances, starts = self._epoch(epoch)
        streams, shards, indices = [], [], []
        for stream, part in appearances[starts[block] : starts[block + 1]]:
            shard, first, count = self._parts[stream][part]
            streams.append(np.full(count, stream))
            shards.append(np.full(count, shard))
            indices.append(np.arange(first, first + count))
        if not streams:
            nothing = np.zeros(0, np.int64)
            return BlockDocuments(nothing, nothing, nothing)
        shuffle = keyed_generator(self.seed, "documents", epoch, block).permutation(sum(map(len, streams)))
        return BlockDocuments(*(np.concatenate(column)[shuffle] for column in (streams, shards, indices)))

    def spans(self, documents: BlockDocuments) -> Spans:
        """Whole documents as spans; reads lengths only (shard headers), never tokens."""
        stop = np.empty(len(documents.index), np.int64)
        place = documents.stream * (1 << 32) + documents.shard
        for value in np.unique(place):
            here = place == value
            stop[here] = self.streams[int(value >> 32)].lengths(int(value & 0xFFFFFFFF))[documents.index[here]]
        return Spans(np.arange(len(stop)), np.zeros(len(stop), np.int64), stop)


@dataclass(frozen=True)
class LaneCursor:
    """Where a lane stands. `taken` lists (max_seq_len, rows) taken from the current block, in order: when a phase
    changes max_seq_len inside a block, the block's remaining tokens are packed anew, so none is lost or repeated."""

    epoch: int = 0
    block: int = 0  # the lane's n-th block of the epoch, block n * lanes + lane overall
    taken: tuple[tuple[int, int], ...] = ()

    def to_list(self) -> list[Any]:
        """JSON form."""
        return [self.epoch, self.block, [list(pair) for pair in self.taken]]

    @classmethod
    def from_list(cls, state: list[Any]) -> "LaneCursor":
        return cls(int(state[0]), int(state[1]), tuple((int(length), int(rows)) for length, rows in state[2]))


@dataclass(frozen=True)
class Row:
    """One planned row: pieces of the block's documents, and the key of its mask."""

    documents: BlockDocuments
    pieces: Spans
    max_seq_len: int
    key: RowKey


class Lane:
    """An endless sequence of rows. Planning reads lengths only; a row is fetched by whoever needs its tokens."""

    def __init__(self, order: MixtureOrder, lane: int, cursor: LaneCursor | None = None) -> None:
        self.order, self.lane = order, lane
        self.cursor = cursor or LaneCursor()
        self._planned: tuple[LaneCursor, int, BlockDocuments, Plan] | None = None

    def take(self, rows: int, max_seq_len: int) -> list[Row]:
        """The next `rows` rows of max_seq_len slots; moves the cursor behind them."""
        taken: list[Row] = []
        barren = 0
        while len(taken) < rows:
            documents, plan, carry, first = self._plan(max_seq_len)
            count = min(rows - len(taken), plan.num_rows - first)
            block = self.cursor.block * self.order.lanes + self.lane
            for row in range(first, first + count):
                key = RowKey(self.cursor.epoch, block, carry, row)
                taken.append(Row(documents, plan.row(row), max_seq_len, key))
            if first + count == plan.num_rows:
                barren = 0 if count else barren + 1
                if barren > 4 * self.order.num_blocks:
                    raise ConfigError(f"data: lane {self.lane} has no documents: add data, or set data.lanes lower")
                last = (self.cursor.block + 1) * self.order.lanes >= self.order.num_blocks
                self.cursor = LaneCursor(self.cursor.epoch + last, 0 if last else self.cursor.block + 1)
            else:
                self.cursor = replace(self.cursor, taken=(*self._before(max_seq_len), (max_seq_len, first + count)))
        return taken

    def _before(self, max_seq_len: int) -> tuple[tuple[int, int], ...]:
        """The cursor's `taken` less a last entry of this very length."""
        taken = self.cursor.taken
        return taken[:-1] if taken and taken[-1][0] == max_seq_len else taken

    def _plan(self, max_seq_len: int) -> tuple[BlockDocuments, Plan, int, int]:
        """Documents, plan, carry key and first row not yet taken, for the current block at this length."""
        before = self._before(max_seq_len)
        place = replace(self.cursor, taken=before)
        first = self.cursor.taken[len(before)][1] if len(self.cursor.taken) > len(before) else 0
        if self._planned is None or self._planned[:2] != (place, max_seq_len):
            block = self.cursor.block * self.order.lanes + self.lane
            documents = self.order.block(self.cursor.epoch, block)
            spans = self.order.spans(documents)
            for depth, (length, rows) in enumerate(before):
                spans = self._pack(spans, length, before[:depth], block).remaining(rows)
            self._planned = (place, max_seq_len, documents, self._pack(spans, max_seq_len, before, block))
        return self._planned[2], self._planned[3], _carry_key(before, max_seq_len), first

    def _pack(self, spans: Spans, max_seq_len: int, before: tuple[tuple[int, int], ...], block: int) -> Plan:
        carry = _carry_key(before, max_seq_len)
        return pack(spans, max_seq_len, keyed_generator(self.order.seed, "rows", self.cursor.epoch, block, carry))


def _carry_key(before: tuple[tuple[int, int], ...], max_seq_len: int) -> int:
    """One number for a plan of a block: what was taken before it, and its row length."""
    return int.from_bytes(hashlib.blake2b(repr((before, max_seq_len)).encode(), digest_size=8).digest())
