"""Batches of a held-out stream."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data.feed.batches import Assembler, Batch
from data.feed.lanes import RowKey, Rows
from data.feed.masking import MaskingConfig
from data.feed.order import DocumentList
from data.feed.packing import Plan, Spans, pack
from data.keyed import keyed_generator
from data.store.shards import Stream


class HeldOutRows:
    """The rows of a held-out stream, packed once: the same rows and masks at every evaluation of a run. Of the stream's
    documents only those in the rows are kept."""

    def __init__(self, stream: Stream, max_seq_len: int, max_rows: int | None, seed: int) -> None:
        """max_rows: at most; None: all. Reads the heads of the stream's shards, no tokens."""
        self.stream, self.max_seq_len, self.seed = stream, max_seq_len, seed
        documents = all_documents(stream)
        spans = Spans(np.arange(len(documents.length)), np.zeros(len(documents.length), np.int64), documents.length)
        plan = pack(spans, max_seq_len, keyed_generator(seed, "validation rows"))
        count = plan.num_rows if max_rows is None else min(max_rows, plan.num_rows)
        starts = plan.row_starts[: count + 1].copy()
        pieces = plan.pieces.take(np.arange(starts[-1]))
        kept, places = np.unique(pieces.document, return_inverse=True)
        self.documents = documents.take(kept)
        self.plan = Plan(Spans(places, pieces.start, pieces.stop), starts, max_seq_len)

    def batches(
        self, rows_per_batch: int, masking: MaskingConfig, tokenizer: Callable[[], Path], rank: int, world_size: int
    ) -> Iterator[Batch]:
        """Those of one rank. Every rank gets the same number of batches (the last may be empty), which collectives in a
        sharded model need."""
        assembler, count = Assembler([self.stream], self.seed, tokenizer), self.plan.num_rows
        for begin in range(0, count, rows_per_batch * world_size):
            first = min(begin + rank * rows_per_batch, count)
            rows = [Rows(self.documents, self.plan, _VALIDATION, first, min(rows_per_batch, count - first))]
            yield assembler.batch(rows, self.max_seq_len, masking).unpack()


def check_masking(streams: Sequence[Stream], masking: MaskingConfig, tokenizer: Callable[[], Path], place: str) -> None:
    """Before anything is measured with it: raises ConfigError, starting with `place`, for one that refuses its
    arguments or the tokenizer."""
    Assembler(streams, 0, tokenizer).build_masking(masking, f"{place}.masking")


def all_documents(stream: Stream, at_most: int | None = None) -> DocumentList:
    """Of a stream, in the order of its shards; at_most: the first ones alone. Reads the heads of their shards."""
    ends = np.cumsum([info.documents for info in stream.manifest.shards])
    shards = len(ends) if at_most is None else min(int(np.searchsorted(ends, at_most)) + 1, len(ends))
    lists = []
    for shard, (length, end) in enumerate(stream.heads(range(shards))):
        nothing = np.zeros(len(length), np.int64)
        lists.append(DocumentList(nothing, nothing + shard, np.arange(len(length)), length, end, nothing))
    return DocumentList.join(lists).take(slice(at_most))


_VALIDATION = RowKey(-1, 0, 0)  # no lane has this number
