"""Token shards: the manifest of a stream, and reading lengths and documents from its MDS files.

A stream is a folder of MDS shards (mosaicml-streaming's on-disk format) with one column `tokens`, one sample per
document. `stream.json` beside `index.json` is written last, so a folder without it is unfinished.

MDS shard layout: uint32 count n, n + 1 uint32 offsets, a JSON header, then the samples. A sample of our one
variable-length column is: uint32 size, one byte for rank and shape dtype, the length in 1, 2 or 4 bytes, the tokens.
So lengths follow from the offsets alone.
"""

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from schema import ConfigError, RunError, Schema

MANIFEST = "stream.json"
_MAX_OPEN_SHARDS = 128


class ShardInfo(Schema):
    """One MDS file of a stream."""

    file: str = Field(description="path relative to the stream's folder")
    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    bytes: int = Field(ge=0, description="file size")
    xxh3_64: str = Field(description="hex digest of the whole file")


class StreamManifest(Schema):
    """What `prepare` writes beside index.json; counts are of the documents kept."""

    schema_version: Literal[1]
    name: str
    split: str
    dtype: Literal["uint16", "uint32"]
    tokenizer_fingerprint: str
    vocab_size: int = Field(ge=1, description="padded; every token id is below it")
    cls_token_id: int
    sep_token_id: int
    pad_token_id: int
    mask_token_id: int
    unk_token_id: int
    special_ids: list[int] = Field(description="ids never drawn as a random replacement")
    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    bytes: int = Field(ge=0, description="UTF-8 bytes of the text")
    empty_documents: int = Field(ge=0)
    duplicate_documents: int = Field(ge=0)
    length_histogram: dict[str, int] = Field(
        description="documents by length in tokens; keys are lower edges, powers of 2"
    )
    source: dict[str, Any]
    shards: list[ShardInfo]


def lengths_from_offsets(offsets: NDArray[np.uint32], itemsize: int) -> NDArray[np.int64]:
    """Token counts of the samples between consecutive offsets, (n,), for tokens of `itemsize` bytes."""
    size = np.diff(offsets.astype(np.int64))
    # 4 bytes of size, 1 of rank and shape dtype, then the length itself in 1, 2 or 4 bytes.
    short, medium, long = (size - 6) // itemsize, (size - 7) // itemsize, (size - 9) // itemsize
    return np.where(short < 256, short, np.where(medium < 65536, medium, long))


class Stream:
    """One split of one stream, opened for reading. Cheap to open: shards are touched, and hashed, at first use.

    Picklable and safe to use after a fork: open files belong to the process that opened them.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises ConfigError when `path` is no finished stream folder."""
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        self.dtype = np.dtype(self.manifest.dtype)
        self._open: OrderedDict[int, tuple[int, NDArray[np.uint32]]] = OrderedDict()
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])

    @property
    def fingerprint(self) -> str:
        """Hash of everything a run's data depends on: the shards' hashes in order, and the tokenizer."""
        parts = [self.manifest.tokenizer_fingerprint, *(shard.xxh3_64 for shard in self.manifest.shards)]
        return xxhash.xxh3_64_hexdigest("\n".join(parts))

    def check_files(self) -> None:
        """Compare every shard's size on disk with the manifest. Raises RunError naming stream, shard and sizes."""
        for info in self.manifest.shards:
            file = self.path / info.file
            found = file.stat().st_size if file.exists() else None
            if found != info.bytes:
                state = "is missing" if found is None else f"is {found} bytes long, expected {info.bytes}"
                raise RunError(f"{file}: shard of stream {self.manifest.name!r} {state}: {_FIX}")

    def lengths(self, shard: int) -> NDArray[np.int64]:
        """Token counts of the shard's documents, (documents,)."""
        return lengths_from_offsets(self._shard(shard)[1], self.dtype.itemsize)

    def document(self, shard: int, index: int, start: int = 0, stop: int | None = None) -> NDArray[np.unsignedinteger]:
        """Token ids [start, stop) of one document, a fresh array of the stream's dtype."""
        handle, offsets = self._shard(shard)
        end = int(offsets[index + 1])
        length = int(lengths_from_offsets(offsets[index : index + 2], self.dtype.itemsize)[0])
        stop = length if stop is None else min(stop, length)
        first = end - (length - start) * self.dtype.itemsize
        wanted = (stop - start) * self.dtype.itemsize
        payload = os.pread(handle, wanted, first)
        if len(payload) != wanted:
            file = self.path / self.manifest.shards[shard].file
            raise RunError(f"{file}: shard of stream {self.manifest.name!r} ended early at document {index}: {_FIX}")
        return np.frombuffer(payload, self.dtype).copy()

    def _shard(self, shard: int) -> tuple[int, NDArray[np.uint32]]:
        """File handle and offsets of a shard; its first use in this process checks the hash of the whole file."""
        if (
            self._owner != os.getpid()
        ):  # after a fork the handles are shared with the parent: pread is safe, eviction is not
            self._open, self._owner, self._lock = OrderedDict(), os.getpid(), threading.Lock()
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
            info = self.manifest.shards[shard]
            file = self.path / info.file
            try:
                data = file.read_bytes()
            except OSError as error:
                raise RunError(f"{file}: shard of stream {self.manifest.name!r}: {error.strerror}: {_FIX}") from None
            found = xxhash.xxh3_64_hexdigest(data)
            if len(data) != info.bytes or found != info.xxh3_64:
                raise RunError(
                    f"{file}: shard of stream {self.manifest.name!r} is damaged: expected {info.bytes} bytes with "
                    f"xxh3_64 {info.xxh3_64}, found {len(data)} with {found}: {_FIX}"
                )
            count = int(np.frombuffer(data, np.uint32, 1)[0])
            offsets = np.frombuffer(data, np.uint32, count + 1, offset=4).copy()
            self._open[shard] = (os.open(file, os.O_RDONLY), offsets)
            if len(self._open) > _MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1][0])
            return self._open[shard]


_FIX = "restore it, or delete the stream's folder and run prepare again"


def open_stream(path: str | Path) -> Stream:
    """Open one split of a stream (`DATASET/STREAM/train`). Raises ConfigError when it is not a finished stream."""
    return Stream(path)


def _read_manifest(path: Path) -> StreamManifest:
    file = path / MANIFEST
    if not path.is_dir():
        raise ConfigError(f"{path}: no such stream folder: run `python main.py prepare` first, or correct the path")
    if not file.exists():
        raise ConfigError(f"{path}: not a finished stream (no {MANIFEST}): run `python main.py prepare` to complete it")
    try:
        return StreamManifest.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(key) for key in first["loc"]) or "content"
        raise ConfigError(f"{file}: {where}: {first['msg']}: prepare the stream again") from None
