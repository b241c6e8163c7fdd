"""Held-out rows are planned once, from the heads of the shards, and are the same at every reading."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.feed.batches import Assembler
from data.feed.held_out import HeldOutRows, all_documents
from data.feed.lanes import RowKey, Rows
from data.feed.masking import MASKINGS
from data.feed.packing import Spans, pack
from data.keyed import keyed_generator
from data.store.shards import open_stream
from tests.helpers.remote import settings, shards_in
from tests.helpers.servers import Proxy

MASKING: Any = MASKINGS.parse({"name": "tokens", "rate": 0.3})


def batches(rows: HeldOutRows, size: int, rank: int = 0, world_size: int = 1) -> list[tuple[list[int], list[int]]]:
    found = rows.batches(size, MASKING, Path, rank, world_size)
    return [(batch["input_ids"].tolist(), batch["labels"].tolist()) for batch in found]


@pytest.mark.parametrize("max_rows", [None, 0, 1, 7, 10**6])
def test_rows_of_all_documents_packed_at_once(local: Path, max_rows: int | None) -> None:
    """Whatever is kept of them: every row, and its masks, are those of the plan of the whole split."""
    stream = open_stream(local)
    documents = all_documents(stream)
    assert documents.length.tolist() == [
        n for shard in range(len(stream.manifest.shards)) for n in stream.lengths(shard)
    ]
    nothing = np.zeros(len(documents.length), np.int64)
    spans = Spans(np.arange(len(nothing)), nothing, documents.length)
    plan = pack(spans, 64, keyed_generator(5, "validation rows"))
    assembler = Assembler([stream], 5, Path)
    count = plan.num_rows if max_rows is None else min(max_rows, plan.num_rows)
    expected = []
    for row in range(count):
        batch = assembler.batch([Rows(documents, plan, RowKey(-1, 0, 0), row, 1)], 64, MASKING).unpack()
        expected.append((batch["input_ids"].tolist(), batch["labels"].tolist()))
    rows = HeldOutRows(stream, 64, max_rows, 5)
    assert batches(rows, 1) == expected
    assert batches(rows, 1) == expected
    turns = zip(batches(rows, 1, 0, 2), batches(rows, 1, 1, 2), strict=True)
    assert [batch for turn in turns for batch in turn if batch[0]] == expected


def test_planning_reads_heads_once(proxy: Proxy, url: str, tmp_path: Path) -> None:
    stream = open_stream(url, settings(tmp_path))
    count = len(stream.manifest.shards)
    rows = HeldOutRows(stream, 64, 2, 5)
    assert len(proxy.gets(".mds")) == count
    assert not shards_in(tmp_path)
    first = batches(rows, 1)
    fetched = len(shards_in(tmp_path))
    assert 0 < fetched < count
    assert len(proxy.gets(".mds")) == count + fetched
    requests = len(proxy.requests)
    assert batches(rows, 1) == first
    assert len(proxy.requests) == requests


@pytest.mark.parametrize("at_most", [0, 1, 60, 10**6])
def test_the_first_documents_alone(local: Path, proxy: Proxy, url: str, tmp_path: Path, at_most: int) -> None:
    stream = open_stream(url, settings(tmp_path))
    for found, expected in zip(all_documents(stream, at_most), all_documents(open_stream(local)), strict=True):
        np.testing.assert_array_equal(found, expected[:at_most])
    ends = np.cumsum([info.documents for info in stream.manifest.shards])
    assert len(proxy.gets(".mds")) <= 1 + int((ends < at_most).sum())
