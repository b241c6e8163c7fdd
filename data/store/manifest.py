"""What stream.json and chunks.npy say of a stream's shards, and where the files of a stream may be.

MDS shard layout: uint32 count n, n + 1 uint32 offsets, a JSON header, then the samples. A sample of our one
variable-length column is: uint32 size, one byte for rank and shape dtype, the length in 1, 2 or 4 bytes, the tokens.
So lengths follow from the offsets alone.
"""

from collections.abc import Sequence
from io import BytesIO
from typing import Any, Literal, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import Field

from flexbert_core.schema import Schema

MANIFEST = "stream.json"
CHUNKS = "chunks.npy"
MAX_CHUNK_DOCUMENTS = 2048
_MIN_CHUNKS = 65536  # a stream of fewer documents has one chunk for each


class ShardInfo(Schema):
    """One MDS file of a stream."""

    file: str = Field(description="path relative to the stream's folder")
    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    bytes: int = Field(ge=0, description="file size")
    xxh3_64: str = Field(description="hex digest of the whole file")
    header_xxh3_64: str = Field(description="hex digest of the count and the offsets, the first 4 * (documents + 2)")


class StreamManifest(Schema):
    """What `prepare` writes beside index.json; counts are of the documents kept.

    null, or a default: of a stream that was prepared before there was such a field.
    """

    schema_version: Literal[2]
    name: str
    split: str
    dtype: Literal["uint16", "uint32"]
    tokenizer_fingerprint: str
    vocab_size: int = Field(ge=1, description="padded; every token id is below it")
    cls_token_id: int
    sep_token_id: int
    pad_token_id: int
    mask_token_id: int
    unk_token_id: int | None = Field(description="null: the tokenizer has none")
    special_ids: list[int] = Field(description="ids never drawn as a random replacement")
    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    bytes: int = Field(ge=0, description="UTF-8 bytes of the text")
    empty_documents: int = Field(ge=0)
    duplicate_documents: int = Field(ge=0)
    filtered: dict[str, int] = Field({}, description="documents that each filter of prepare dropped")
    over_max_bytes: int | None = Field(None, ge=0, description="documents that max_bytes left out")
    unknown_tokens: int | None = Field(None, ge=0, description="tokens that are unk_token_id")
    read: dict[str, int] | None = Field(None, description="files and documents read, of the whole stream: all splits")
    skipped: dict[str, dict[str, int]] = Field(
        {}, description="files and documents left out while reading, by reason, of the whole stream"
    )
    length_histogram: dict[str, int] = Field(
        description="documents by length in tokens; keys are lower edges, powers of 2"
    )
    source: dict[str, Any]
    chunk_documents: int = Field(ge=1, description="documents per chunk; the last chunk of a shard may have fewer")
    chunks_xxh3_64: str = Field(description="hex digest of chunks.npy")
    shards: list[ShardInfo]


def lengths_from_offsets(offsets: NDArray[np.uint32], itemsize: int) -> NDArray[np.int64]:
    """Token counts of the samples between consecutive offsets, (n,), for tokens of `itemsize` bytes."""
    size = np.diff(offsets.astype(np.int64))
    # 4 bytes of size, 1 of rank and shape dtype, then the length itself in 1, 2 or 4 bytes.
    short, medium, long = (size - 6) // itemsize, (size - 7) // itemsize, (size - 9) // itemsize
    return np.where(short < 256, short, np.where(medium < 65536, medium, long))


def chunk_documents(documents: int) -> int:
    """Documents per chunk of a stream of this many: a power of two, one where the stream is small."""
    return max(1, min(MAX_CHUNK_DOCUMENTS, 1 << (documents // _MIN_CHUNKS).bit_length() >> 1))


def describe_shard(data: bytes, itemsize: int, chunk: int) -> tuple[str, NDArray[np.uint64]]:
    """Header digest of an MDS file, and its chunks: (chunks, 2) uint64, tokens and xxh3_64 of their bytes."""
    count = int(np.frombuffer(data, np.uint32, 1)[0])
    offsets = np.frombuffer(data, np.uint32, count + 1, offset=4)
    edges = np.append(np.arange(0, count, chunk), count)
    totals = np.concatenate([[0], np.cumsum(lengths_from_offsets(offsets, itemsize))])
    chunks = np.zeros((len(edges) - 1, 2), np.uint64)
    chunks[:, 0] = np.diff(totals[edges])
    view = memoryview(data)
    for number, (first, stop) in enumerate(zip(offsets[edges[:-1]].tolist(), offsets[edges[1:]].tolist(), strict=True)):
        chunks[number, 1] = xxhash.xxh3_64_intdigest(view[first:stop])
    return xxhash.xxh3_64_hexdigest(view[: 4 * (count + 2)]), chunks


def pack_chunks(chunks: Sequence[NDArray[np.uint64]]) -> tuple[bytes, str]:
    """The content of chunks.npy from the chunks of all shards in order, and its digest."""
    file = BytesIO()
    np.save(file, np.concatenate([np.zeros((0, 2), np.uint64), *chunks]))
    return file.getvalue(), xxhash.xxh3_64_hexdigest(file.getvalue())


class StreamFiles(Protocol):
    """Where the files of a stream are."""

    fix: str
    """What to do about a damaged shard."""
    pool: str
    """The cache's folder, of files that come through one; else nothing."""
    max_open_bytes: float
    """Of shards of this pool that a process may hold open, over all its streams."""

    def read(self, name: str) -> bytes:
        """A small file. Raises ConfigError when it is not there."""
        ...

    def open(self, info: ShardInfo) -> int:
        """A descriptor of a whole shard on local disk; the caller closes it. Raises RunError."""
        ...

    def head(self, info: ShardInfo, size: int) -> bytes:
        """The first bytes of a shard, read without the rest. Raises RunError."""
        ...

    def check(self, infos: Sequence[ShardInfo]) -> None:
        """Raises RunError naming a shard that is missing or has another size than expected, if there is one."""
        ...

    def prefetch(self, infos: Sequence[ShardInfo]) -> None:
        """These shards will be opened soon, in this order."""
        ...
