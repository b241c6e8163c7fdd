"""Reading shards: equal to mosaicml-streaming's own reader; damage is said, never read."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from streaming.base.format import reader_from_json

from data.store.manifest import chunk_documents
from data.store.shards import Stream, open_stream
from flexbert_core.schema import ConfigError, RunError
from tests.helpers.synthetic import documents, write_stream


@pytest.mark.parametrize("vocab_size", [512, 100_000])
def test_equals_streaming_reader(tmp_path: Path, vocab_size: int) -> None:
    docs = [
        *documents(0, 200, 700, vocab_size),
        np.arange(5, 260) % vocab_size,
        np.arange(5, 261),
        np.arange(70_000) % 500 + 5,
    ]
    path = write_stream(
        tmp_path / "s", "train", docs, vocab_size, shard_bytes=1 << 15 if vocab_size == 512 else 1 << 20
    )
    stream = open_stream(path)
    index = json.loads((path / "index.json").read_text())
    assert len(index["shards"]) > 1 or vocab_size > 512
    number = 0
    for shard, entry in enumerate(index["shards"]):
        reader = reader_from_json(str(path), None, entry)
        lengths = stream.lengths(shard)
        for sample in range(entry["samples"]):
            expected = reader[sample]["tokens"]
            assert lengths[sample] == len(expected)
            np.testing.assert_array_equal(stream.document(shard, sample), expected)
            np.testing.assert_array_equal(stream.document(shard, sample, 1, 5), expected[1:5])
            np.testing.assert_array_equal(expected, docs[number])
            number += 1
    assert number == len(docs)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 65_535, 65_536, 65_537])
@pytest.mark.parametrize("vocab_size", [512, 100_000])
def test_lengths_around_the_header_sizes(tmp_path: Path, length: int, vocab_size: int) -> None:
    path = write_stream(tmp_path / "s", "train", [np.full(length, 7)], vocab_size, shard_bytes=1 << 22)
    stream = open_stream(path)
    assert stream.lengths(0).tolist() == [length]
    assert len(stream.document(0, 0)) == length


def test_many_shards_open_and_fork_and_pickle(tmp_path: Path) -> None:
    docs = documents(1, 300, 40)
    stream = open_stream(write_stream(tmp_path / "s", "train", docs, shard_bytes=256))
    assert len(stream.manifest.shards) > 128  # more than are held open
    first = [stream.document(shard, 0) for shard in range(len(stream.manifest.shards))]
    again = pickle.loads(pickle.dumps(stream))
    for shard, expected in enumerate(first):
        np.testing.assert_array_equal(again.document(shard, 0), expected)
    child = os.fork()
    if child == 0:
        same = all(np.array_equal(stream.document(shard, 0), expected) for shard, expected in enumerate(first))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    np.testing.assert_array_equal(stream.document(0, 0), first[0])


def _damaged(tmp_path: Path) -> tuple[Stream, Path]:
    stream = open_stream(write_stream(tmp_path / "prose", "train", documents(0, 300, 100)))
    return stream, Path(stream.path) / stream.manifest.shards[1].file


def test_truncated_shard(tmp_path: Path) -> None:
    stream, file = _damaged(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    for read in (stream.check_files, lambda: stream.document(1, 0)):
        with pytest.raises(RunError, match=rf"stream 'prose': shard .*{file.name}: .*bytes.*expected"):
            read()


def test_flipped_bit(tmp_path: Path) -> None:
    stream, file = _damaged(tmp_path)
    data = bytearray(file.read_bytes())
    data[-10] ^= 4
    file.write_bytes(data)
    stream.check_files()  # the size is right
    with pytest.raises(
        RunError, match=rf"stream 'prose': shard .*{file.name}: damaged: .*expected xxh3_64 [0-9a-f]+, found [0-9a-f]+"
    ):
        stream.document(1, len(stream.lengths(1)) - 1)


@pytest.mark.parametrize("place", [2, 9])
def test_flipped_offset(tmp_path: Path, place: int) -> None:
    """Offsets decide the order of documents and rows: they are checked before the first length is believed."""
    stream, file = _damaged(tmp_path)
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)
    with pytest.raises(RunError, match=r"damaged: offsets: expected xxh3_64 [0-9a-f]+, found [0-9a-f]+"):
        stream.lengths(1)


def test_foreign_shard(tmp_path: Path) -> None:
    """Another whole shard of the same stream under this one's name."""
    stream, file = _damaged(tmp_path)
    file.write_bytes((file.parent / stream.manifest.shards[0].file).read_bytes())
    with pytest.raises(RunError, match=rf"{file.name}: damaged: .*expected .*, found"):
        stream.lengths(1)


def test_damaged_chunk_list(tmp_path: Path) -> None:
    stream, file = _damaged(tmp_path)
    (file.parent / "chunks.npy").write_bytes((file.parent / "chunks.npy").read_bytes()[:-8] + b"12345678")
    with pytest.raises(RunError, match=r"chunks.npy: damaged: expected xxh3_64"):
        stream.document(1, 0)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_chunks(tmp_path: Path, chunk: int) -> None:
    """Chunks restart with every shard; their tokens are those of their documents."""
    docs = documents(0, 300, 100)
    stream = open_stream(write_stream(tmp_path / "prose", "train", docs, chunk=chunk))
    lengths = iter([len(document) for document in docs])
    expected = []
    for shard in stream.manifest.shards:
        own = [next(lengths) for _ in range(shard.documents)]
        expected += [sum(own[first : first + chunk]) for first in range(0, len(own), chunk)]
    assert stream.chunks[:, 0].tolist() == expected
    for shard in range(len(stream.manifest.shards)):
        for index in range(len(stream.lengths(shard))):
            stream.document(shard, index)


@pytest.mark.parametrize(
    ("count", "chunk"), [(0, 1), (131_071, 1), (131_072, 2), (1_000_000, 8), (10**8, 1024), (2 * 10**9, 2048)]
)
def test_chunk_sizes(count: int, chunk: int) -> None:
    """At least 65,536 chunks where there are documents for them, and about a million at two billion documents."""
    assert chunk_documents(count) == chunk


def test_missing_shard(tmp_path: Path) -> None:
    stream, file = _damaged(tmp_path)
    file.unlink()
    with pytest.raises(RunError, match=rf"stream 'prose': shard .*{file.name}: is missing"):
        stream.check_files()


def test_truncated_while_open(tmp_path: Path) -> None:
    stream, file = _damaged(tmp_path)
    last = len(stream.lengths(1)) - 1
    stream.document(1, last)
    os.truncate(file, 64)
    with pytest.raises(RunError, match="ended early"):
        stream.document(1, last)


def test_not_a_stream(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such stream folder.*prepare"):
        open_stream(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"not a finished stream \(no stream.json\)"):
        open_stream(tmp_path)
    (tmp_path / "stream.json").write_text('{"schema_version": 2, "name": 3}')
    with pytest.raises(ConfigError, match="stream.json: name"):
        open_stream(tmp_path)
