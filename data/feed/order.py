"""The order of a stream's documents is arithmetic: an endless line, dealt to lanes.

A *part* is a run of consecutive documents of one shard. A *pass* is the stream's parts in an order drawn from (seed,
stream, pass): a line of tokens, on which a document lies where its first token lies. Pass follows pass without end.
Lane l of L owns one of L equal stretches of every pass, the (l + pass) mod L-th. So which documents a lane sees next
follows from a pass and a place on the line, and every document is seen once per pass. Memory grows with the number of
parts, never with the number of documents.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.keyed import keyed_generator
from data.store.shards import Stream
from flexbert_core.schema import ConfigError

_CUT_OVER = 1024  # tokens
_CACHED_PASSES = 3  # lanes stand in the same pass or in neighbouring ones


class Place(NamedTuple):
    """Where a lane stands on a stream's line."""

    number: int = 0  # of the pass
    token: int = -1  # on the line of the pass; -1: at the start of the lane's stretch
    into: int = 0  # tokens already taken of the document that lies there
    owed: int = 0  # tokens that the lane has taken beyond what the mixture gave it: most documents are taken whole


class DocumentList(NamedTuple):
    """Documents of a block, every column (n,) int64."""

    stream: NDArray[np.int64]
    shard: NDArray[np.int64]
    index: NDArray[np.int64]  # in the shard
    length: NDArray[np.int64]  # tokens
    end: NDArray[np.int64]  # byte of the shard behind the last token
    number: NDArray[np.int64]  # of the pass that shows it

    def take(self, which: NDArray[np.integer] | NDArray[np.bool_] | slice) -> "DocumentList":
        """The documents at these positions."""
        return DocumentList(*(column[which] for column in self))

    @classmethod
    def join(cls, lists: list["DocumentList"]) -> "DocumentList":
        """One list after the other."""
        if not lists:
            return cls(*(np.zeros(0, np.int64) for _ in cls._fields))
        return cls(*(np.concatenate(columns) for columns in zip(*lists, strict=True)))


def share_out(counted: NDArray[np.int64], wanted: int, cut: bool) -> tuple[int, int, bool]:
    """How many leading entries to take whole, how many tokens of the next, and whether that makes up what is wanted.

    counted: tokens of each, (n,). An entry at which `wanted` falls is taken or left, whichever is nearer; if `cut` and
    it has over 1024 tokens, it is divided exactly, for a few long documents would otherwise distort the mixture.
    """
    total = np.cumsum(counted)
    last = int(np.searchsorted(total, wanted, side="left"))
    if last == len(total):
        return last, 0, False
    size = int(counted[last])
    missing = wanted - int(total[last]) + size
    if missing == size:
        return last + 1, 0, True
    if cut and size > _CUT_OVER:
        return last, missing, True
    return last + (2 * missing >= size), 0, True


class StreamLine:
    """The endless line of one stream."""

    def __init__(
        self, stream: Stream, number: int, seed: int, lanes: int, part_documents: int, shuffle_shards: int | None
    ) -> None:
        """number: of the stream in the mixture. part_documents: per part at most. shuffle_shards: a stretch of the line
        mixes the parts of this many shards at a time, and a shard's parts lie close together; None: of all shards."""
        self.stream, self.number, self.seed, self.lanes = stream, number, seed, lanes
        self.shuffle_shards = shuffle_shards
        manifest = stream.manifest
        chunk = manifest.chunk_documents
        per_part = max(1, part_documents // chunk)
        chunks = np.diff(stream.first_chunk)
        parts = -(-chunks // per_part)
        self._shard = np.repeat(np.arange(len(chunks)), parts)
        nth = np.arange(len(self._shard)) - np.repeat(np.cumsum(parts) - parts, parts)
        first, last = (((nth + edge) * chunks[self._shard]) // parts[self._shard] for edge in (0, 1))
        documents = np.array([shard.documents for shard in manifest.shards], np.int64)
        self._first = first * chunk
        self._count = np.minimum(last * chunk, documents[self._shard]) - self._first
        totals = np.concatenate([[0], np.cumsum(stream.chunks[:, 0].astype(np.int64))])
        base = stream.first_chunk[self._shard]
        self._tokens = totals[base + last] - totals[base + first]
        self.tokens = int(totals[-1])
        self._passes: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()

    def take(
        self,
        lane: int,
        place: Place,
        wanted: int,
        shown: Callable[[NDArray[np.int64]], NDArray[np.int64]],
        cut: bool,
    ) -> tuple[DocumentList, NDArray[np.int64], NDArray[np.int64], Place]:
        """The lane's next documents with about `wanted` tokens, what to show of each, [start, stop) both (n,), and the
        place behind them. Reads lengths, never tokens.

        shown: from the lengths of documents, (n,), to how many of their tokens count, from the first on; one with none
        is passed over. cut: see share_out. Raises ConfigError when no document of the stream has tokens that count.
        """
        number, token, into, owed = place
        wanted -= owed
        lists: list[DocumentList] = []
        spans: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        barren, reached = 0, wanted <= 0
        while not reached:
            order, edges = self._pass(number)
            begin, end = self.stretch(lane, number)
            token = max(token, begin)
            part = int(np.searchsorted(edges, token, side="right")) - 1
            found = False
            while not reached and part < len(order) and edges[part] < end:
                documents = self._part(int(order[part]), number)
                starts = edges[part] + np.cumsum(documents.length) - documents.length
                first, last = np.searchsorted(starts, (token, end)).tolist()
                documents = documents.take(slice(first, last))
                start, stop = np.zeros(last - first, np.int64), shown(documents.length)
                start[:1] = into
                whole, piece, reached = share_out(np.maximum(stop - start, 0), wanted, cut)
                stop[whole : whole + 1] = start[whole : whole + 1] + piece
                token = int(edges[part + 1]) if whole == last - first else int(starts[first + whole])
                # Behind the piece taken, or behind what an earlier block took of a document that this one leaves.
                into = int(start[whole]) + piece if whole < last - first else 0
                kept = np.flatnonzero(stop[: whole + (piece > 0)] > start[: whole + (piece > 0)])
                lists.append(documents.take(kept))
                spans.append((start[kept], stop[kept]))
                taken = int((stop[kept] - start[kept]).sum())
                wanted -= taken
                found |= taken > 0
                part += 1
            if not reached:
                number, token, into = number + 1, -1, 0
                barren += not found
                if barren == self.lanes and not self._shows_any(shown):
                    raise ConfigError(
                        f"data: stream {self.stream.manifest.name!r}: no document is left by min_length and "
                        "long_documents: choose others, or longer rows"
                    )
        nothing = np.zeros(0, np.int64)
        start, stop = (np.concatenate(column) for column in zip((nothing, nothing), *spans, strict=True))
        return DocumentList.join(lists), start, stop, Place(number, token, into, -wanted)

    def stretch(self, lane: int, number: int) -> tuple[int, int]:
        """The tokens of pass `number` that are the lane's: [begin, end). They rotate, so that every lane comes to see
        also a stream of fewer documents than lanes."""
        slot = (lane + number) % self.lanes
        return self.tokens * slot // self.lanes, self.tokens * (slot + 1) // self.lanes

    def _shows_any(self, shown: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> bool:
        """Whether any document has tokens that count. Reads all lengths: for when a lane has long found none."""
        return self.stream.count(shown) > 0

    def _part(self, part: int, number: int) -> DocumentList:
        shard, first, count = (int(column[part]) for column in (self._shard, self._first, self._count))
        length, end = self.stream.documents(shard, first, count)
        same = [np.full(count, value, np.int64) for value in (self.number, shard, number)]
        return DocumentList(same[0], same[1], np.arange(first, first + count), length, end, same[2])

    def _pass(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Parts of a pass in order, (parts,), and where on its line they start, (parts + 1,)."""
        if number not in self._passes:
            rng = keyed_generator(self.seed, "pass", self.number, number)
            order = rng.permutation(len(self._shard))
            if self.shuffle_shards is not None:
                window = rng.permutation(len(self.stream.manifest.shards)) // self.shuffle_shards
                order = order[np.argsort(window[self._shard[order]], kind="stable")]
            self._passes[number] = (order, np.concatenate([[0], np.cumsum(self._tokens[order])]))
            while len(self._passes) > _CACHED_PASSES:
                self._passes.popitem(last=False)
        self._passes.move_to_end(number)
        return self._passes[number]

    def upcoming_shards(self, lane: int, place: Place, tokens: int) -> list[int]:
        """Shards that hold the lane's next `tokens` tokens of this pass, in the order of their use."""
        if tokens == 0:
            return []
        order, edges = self._pass(place.number)
        begin, end = self.stretch(lane, place.number)
        token = max(place.token, begin)
        first = int(np.searchsorted(edges, token, side="right")) - 1
        last = int(np.searchsorted(edges, min(token + tokens, end), side="left"))
        return list(dict.fromkeys(self._shard[order[first:last]].tolist()))
