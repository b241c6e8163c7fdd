"""Batches of a held-out stream."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data.feed.batches import Assembler, Batch
from data.feed.lanes import RowKey, Rows
from data.feed.masking import MaskingConfig
from data.feed.order import DocumentList
from data.feed.packing import Spans, pack
from data.keyed import keyed_generator
from data.store.shards import Stream


def validation_batches(
    stream: Stream,
    max_seq_len: int,
    rows_per_batch: int,
    max_rows: int | None,
    seed: int,
    masking: MaskingConfig,
    tokenizer: Callable[[], Path],
    rank: int,
    world_size: int,
) -> Iterator[Batch]:
    """A held-out stream, packed once, the same rows and masks at every evaluation of a run.

    Every rank gets the same number of batches (the last may be empty), which collectives in a sharded model need.
    """
    documents = all_documents(stream)
    spans = Spans(np.arange(len(documents.length)), np.zeros(len(documents.length), np.int64), documents.length)
    plan = pack(spans, max_seq_len, keyed_generator(seed, "validation rows"))
    assembler = Assembler([stream], seed, tokenizer)
    count = plan.num_rows if max_rows is None else min(max_rows, plan.num_rows)
    for begin in range(0, count, rows_per_batch * world_size):
        first = min(begin + rank * rows_per_batch, count)
        rows = [Rows(documents, plan, _VALIDATION, first, min(rows_per_batch, count - first))]
        yield assembler.batch(rows, max_seq_len, masking).unpack()


def check_masking(streams: Sequence[Stream], masking: MaskingConfig, tokenizer: Callable[[], Path], place: str) -> None:
    """Before anything is measured with it: raises ConfigError, starting with `place`, for one that refuses its
    arguments or the tokenizer."""
    Assembler(streams, 0, tokenizer).build_masking(masking, f"{place}.masking")


def all_documents(stream: Stream) -> DocumentList:
    """Of a stream, in the order of its shards."""
    lists = []
    for shard, info in enumerate(stream.manifest.shards):
        nothing, (length, end) = np.zeros(info.documents, np.int64), stream.documents(shard, 0, info.documents)
        lists.append(DocumentList(nothing, nothing + shard, np.arange(info.documents), length, end, nothing))
    return DocumentList.join(lists)


_VALIDATION = RowKey(-1, 0, 0)  # no lane has this number
