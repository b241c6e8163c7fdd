"""Token shards: reading lengths and documents of a stream from its MDS files.

A stream is a folder of MDS shards (mosaicml-streaming's on-disk format) with one column `tokens`, one sample per
document. Beside them: `chunks.npy`, tokens and hash of every *chunk* (up to `chunk_documents` consecutive documents of
a shard), and `stream.json`, which is written last, so a folder without it is unfinished.

Offsets are checked by hash when a shard is first opened, tokens chunk by
chunk when first used: what is read twice is hashed once, and what is never read is never hashed.
"""

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import ValidationError

from data.store.cache import CacheConfig
from data.store.local import STAT_THREADS, LocalFiles, what_failed
from data.store.manifest import CHUNKS, MANIFEST, ShardInfo, StreamFiles, StreamManifest, lengths_from_offsets
from data.store.open_shards import OPEN_SHARDS, OpenShard
from data.store.transfer import is_url
from flexbert_core.schema import ConfigError, RunError


class Documents(NamedTuple):
    """A run of documents of one shard: token counts and, in bytes, where in the file each one ends. Both (n,) int64."""

    length: NDArray[np.int64]
    end: NDArray[np.int64]


class Stream:
    """One split of one stream, opened for reading. Cheap to open: shards are touched, and checked, at first use.

    Picklable, and safe to use after a fork. Open files are closed when the stream is forgotten.
    """

    def __init__(self, path: str | Path, files: StreamFiles | None = None) -> None:
        """files: default: those of the folder `path`. Raises ConfigError when it is no finished stream."""
        self.path = str(path)
        self.files = LocalFiles(Path(path)) if files is None else files
        self.manifest = self._read_manifest()
        self.dtype = np.dtype(self.manifest.dtype)
        documents = np.array([shard.documents for shard in self.manifest.shards], np.int64)
        self.first_chunk = np.concatenate([[0], np.cumsum(-(-documents // self.manifest.chunk_documents))])
        """(shards + 1,) int64: number of the first chunk of each shard."""
        self.opened: dict[int, OpenShard] = {}
        self._checked: set[int] = set()
        self._lock, self._owner = threading.Lock(), os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "files": self.files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["files"])

    @property
    def fingerprint(self) -> str:
        """Hash of everything a run's data depends on: the shards' hashes in order, and the tokenizer."""
        parts = [self.manifest.tokenizer_fingerprint, *(shard.xxh3_64 for shard in self.manifest.shards)]
        return xxhash.xxh3_64_hexdigest("\n".join(parts))

    @cached_property
    def chunks(self) -> NDArray[np.uint64]:
        """(chunks, 2) uint64: tokens and xxh3_64 of every chunk. Raises RunError when chunks.npy is damaged."""
        data = self.files.read(CHUNKS)
        found = xxhash.xxh3_64_hexdigest(data)
        if found != self.manifest.chunks_xxh3_64:
            expected = self.manifest.chunks_xxh3_64
            raise RunError(
                f"{self.path}/{CHUNKS}: damaged: expected xxh3_64 {expected}, found {found}: {self.files.fix}"
            )
        return np.load(BytesIO(data), allow_pickle=False)

    def check_files(self) -> None:
        """Compare every shard's size with the manifest. Raises RunError naming stream, shard and sizes."""
        try:
            self.files.check(self.manifest.shards)
        except RunError as error:
            raise self._fault(error) from None

    def prefetch(self, shards: Sequence[int]) -> None:
        """These shards will be read soon, in this order."""
        self.files.prefetch([self.manifest.shards[shard] for shard in shards if shard not in self.opened])

    def documents(self, shard: int, first: int, count: int) -> Documents:
        """Lengths and places of documents first to first + count of a shard; reads offsets only, never tokens."""
        return self._documents(self._shard(shard).offsets[first : first + count + 1])

    def lengths(self, shard: int) -> NDArray[np.int64]:
        """Token counts of the shard's documents, (documents,)."""
        return self.documents(shard, 0, self.manifest.shards[shard].documents).length

    def count(self, counted: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> int:
        """Sum over all documents of what `counted` makes of their token counts, (n,) -> (n,). Reads the head of every
        shard and no more of it: 4 bytes for a document. Raises RunError for a damaged one."""

        def of(shard: int) -> int:
            return int(counted(self._head(shard).length).sum())

        with ThreadPoolExecutor(STAT_THREADS) as pool:
            return sum(pool.map(of, range(len(self.manifest.shards))))

    def heads(self, shards: Iterable[int]) -> list[Documents]:
        """All documents of each of these shards. Reads what `count` reads."""
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            return list(pool.map(self._head, shards))

    def _head(self, shard: int) -> Documents:
        info = self.manifest.shards[shard]
        try:
            head = self.files.head(info, 4 * (info.documents + 2))
        except RunError as error:
            raise self._fault(error) from None
        return self._documents(self._offsets(shard, head))

    def _documents(self, offsets: NDArray[np.uint32]) -> Documents:
        return Documents(lengths_from_offsets(offsets, self.dtype.itemsize), offsets[1:].astype(np.int64))

    def document(self, shard: int, index: int, start: int = 0, stop: int | None = None) -> NDArray[np.unsignedinteger]:
        """Token ids [start, stop) of one document, a fresh array of the stream's dtype."""
        place = self.documents(shard, index, 1)
        length = int(place.length[0])
        stop = length if stop is None else min(stop, length)
        tokens = np.empty(stop - start, self.dtype)
        first = int(place.end[0]) - (length - start) * self.dtype.itemsize
        self.read_into(shard, index, first, tokens.data.cast("B"))
        return tokens

    def read_into(self, shard: int, index: int, first_byte: int, out: memoryview) -> None:
        """Fill `out` with bytes of document `index` from `first_byte` of the file on. The first use of a chunk in this
        process checks its hash. Raises RunError naming stream, shard, expected and found hash."""
        opened = self._shard(shard)
        chunk = int(self.first_chunk[shard]) + index // self.manifest.chunk_documents
        if chunk not in self._checked:
            self._check_chunk(shard, chunk, opened)
        try:
            count = os.preadv(opened.handle, [out], first_byte)
        except OSError as error:
            raise self._refused(shard, error) from None
        if count != len(out):
            raise self._fault(RunError(f"{self._file(shard)}: ended early at document {index}: {self.files.fix}"))

    def _check_chunk(self, shard: int, chunk: int, opened: OpenShard) -> None:
        size = self.manifest.chunk_documents
        first = (chunk - int(self.first_chunk[shard])) * size
        stop = min(first + size, self.manifest.shards[shard].documents)
        begin, end = int(opened.offsets[first]), int(opened.offsets[stop])
        try:
            found = xxhash.xxh3_64_intdigest(os.pread(opened.handle, end - begin, begin))
        except OSError as error:
            raise self._refused(shard, error) from None
        expected = int(self.chunks[chunk, 1])
        if found != expected:
            raise self._damaged(shard, f"documents {first} to {stop - 1}", f"{expected:016x}", f"{found:016x}")
        self._checked.add(chunk)

    def _shard(self, shard: int) -> OpenShard:
        """The shard, open; opening it checks its size and the hash of its offsets. Keep it as long as it is read."""
        opened = self.opened.get(shard)
        if opened is not None:
            OPEN_SHARDS.touch(opened)
            return opened
        if self._owner != os.getpid():  # a fork: the lock may be held for ever
            self._lock, self._owner = threading.Lock(), os.getpid()
        with self._lock:
            opened = self.opened.get(shard)  # another thread may have been faster
            return self._open(shard) if opened is None else opened

    def _open(self, shard: int) -> OpenShard:
        info, files = self.manifest.shards[shard], self.files
        OPEN_SHARDS.make_room(files.pool, info.bytes, files.max_open_bytes)
        try:
            handle = files.open(info)
        except RunError as error:
            raise self._fault(error) from None
        try:
            opened = OpenShard(handle, self._read_offsets(shard, info, handle))
        except BaseException as error:
            os.close(handle)
            raise (self._refused(shard, error) if isinstance(error, OSError) else error) from None
        OPEN_SHARDS.add(opened, self, shard, files.pool, info.bytes)
        return opened

    def _read_offsets(self, shard: int, info: ShardInfo, handle: int) -> NDArray[np.uint32]:
        size = os.fstat(handle).st_size
        if size != info.bytes:
            raise self._damaged(shard, "size in bytes", str(info.bytes), str(size))
        return self._offsets(shard, os.pread(handle, 4 * (info.documents + 2), 0))

    def _offsets(self, shard: int, header: bytes) -> NDArray[np.uint32]:
        """From a shard's first 4 * (documents + 2) bytes."""
        info, found = self.manifest.shards[shard], xxhash.xxh3_64_hexdigest(header)
        if found != info.header_xxh3_64:
            raise self._damaged(shard, "offsets", info.header_xxh3_64, found)
        return np.frombuffer(header, np.uint32)[1:]

    def _file(self, shard: int) -> str:
        return f"{self.path}/{self.manifest.shards[shard].file}"

    def _damaged(self, shard: int, what: str, expected: str, found: str) -> RunError:
        kind = "" if what.startswith("size") else "xxh3_64 "
        return self._fault(
            RunError(
                f"{self._file(shard)}: damaged: {what}: expected {kind}{expected}, found {found}: {self.files.fix}"
            )
        )

    def _refused(self, shard: int, error: OSError) -> RunError:
        return self._fault(RunError(f"{self._file(shard)}: {what_failed(error, self.files.fix)}"))

    def _fault(self, error: RunError) -> RunError:
        return RunError(f"stream {self.manifest.name!r}: shard {error}")

    def _read_manifest(self) -> StreamManifest:
        try:
            return StreamManifest.model_validate_json(self.files.read(MANIFEST))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(key) for key in first["loc"]) or "content"
            raise ConfigError(f"{self.path}/{MANIFEST}: {where}: {first['msg']}: prepare the stream again") from None


def open_stream(path: str | Path, cache: CacheConfig | None = None) -> Stream:
    """Open one split of a stream (`DATASET/STREAM/train`), a folder or a URL. Raises ConfigError when it is not a
    finished stream, RunError when a server cannot be reached.

    cache: for a URL; default: the config's defaults.
    """
    if not is_url(path):
        return Stream(path)
    from data.store.remote import RemoteFiles

    return Stream(path, RemoteFiles(str(path), cache or CacheConfig()))
