"""A stream behind a URL: its shards come through the cache, checked by hash while they are downloaded."""

import os
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from data.store.cache import CacheConfig, CachedShard, ShardCache
from data.store.manifest import ShardInfo
from data.store.open_shards import OPEN_SHARDS
from data.store.prefetch import Job, Prefetcher
from data.store.transfer import Patience, Store, TransferError, open_store, with_retries
from flexbert_core.schema import ConfigError, RunError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_AHEAD = 4  # a process fetches at most 1/4 of the cache's limit ahead of use
_OPEN = 2  # and holds at most 1/2 open
_LOOK_SECONDS = 0.5  # between looks for shards that others have evicted
_TOO_LONG = 2  # times the expected size: what is even longer is not read to its end to name its hash


class RemoteFiles:
    """The files of a stream behind a URL. Connections and threads are each process's own, made when first needed."""

    fix = "upload it again, or delete the stream and run prepare again"

    def __init__(self, url: str, config: CacheConfig) -> None:
        self.url, self.config = url.rstrip("/"), config
        self.patience = Patience(config.download_retries, config.download_timeout)
        self.cache = ShardCache(config.cache_folder, config.cache_limit)
        self.pool, self.max_open_bytes = str(config.cache_folder), float(config.cache_limit // _OPEN)
        self._store: tuple[int, Store] | None = None

    def __reduce__(self) -> Any:
        return RemoteFiles, (self.url, self.config)

    def read(self, name: str) -> bytes:
        content = self.find(name)
        if content is None:
            raise ConfigError(f"{self.url}: holds no {name}: correct the URL, or upload all that prepare wrote")
        return content

    def find(self, name: str) -> bytes | None:
        """A small file; None when the server says that it is not there. Raises ConfigError when it refuses, RunError
        when it cannot be reached."""
        try:
            return with_retries(lambda: b"".join(map(bytes, self._open_store().blocks(name))), self.patience)
        except TransferError as error:
            if error.kind == "missing":
                return None
            raise (RunError if error.kind == "passing" else ConfigError)(str(error)) from None

    def open(self, info: ShardInfo) -> int:
        shard = _named(info)
        handle = self._prefetcher().take(shard.name)
        if handle is None:
            handle = self.cache.open(shard, partial(self._download, info))
        assert handle is not None
        return handle

    def head(self, info: ShardInfo, size: int) -> bytes:
        def attempt() -> bytes:
            head = bytearray()
            for block in self._open_store().blocks(info.file):
                head += block
                if len(head) >= size:
                    break
            return bytes(head[:size])

        try:
            return with_retries(attempt, self.patience)
        except TransferError as error:
            raise RunError(f"{error}: {self.fix}" if error.kind == "missing" else str(error)) from None

    def check(self, infos: Sequence[ShardInfo]) -> None:
        self.cache.check_fits([_named(info) for info in infos], self.url)
        sizes = self.sizes([info.file for info in infos])
        for info in infos:
            found = sizes.get(info.file, -1)
            if found not in (info.bytes, None):
                state = "is missing" if found == -1 else f"is {found} bytes long, expected {info.bytes} bytes"
                raise RunError(f"{self.url}/{info.file}: {state}: {self.fix}")

    def sizes(self, names: list[str]) -> dict[str, int | None]:
        """Bytes of what lies below the URL, of a web server those of `names`; None where it does not say. Raises
        ConfigError when the server refuses, RunError when it cannot be reached."""
        try:
            return self._open_store().sizes(names)
        except TransferError as error:
            raise (RunError if error.kind == "passing" else ConfigError)(str(error)) from None

    def prefetch(self, infos: Sequence[ShardInfo]) -> None:
        if infos:
            self._prefetcher().announce([self._job(info) for info in infos])

    def _job(self, info: ShardInfo) -> Job:
        shard = _named(info)

        def fetch() -> int | None:
            return None if self.cache.has(shard) else self.cache.open(shard, partial(self._download, info), ahead=True)

        return Job(shard.name, shard.bytes, fetch)

    def _prefetcher(self) -> Prefetcher:
        """One for all streams of this process that share a cache."""
        if os.getpid() not in _watched:
            _watched.add(os.getpid())
            threading.Thread(target=_close_evicted, name="evicted-shards", daemon=True).start()
        key = (os.getpid(), self.config.cache, self.config.cache_limit)
        return _prefetchers.setdefault(key, Prefetcher(self.config.cache_limit // _AHEAD))

    def _open_store(self) -> Store:
        if self._store is None or self._store[0] != os.getpid():
            self._store = (os.getpid(), open_store(self.url, self.patience))
        return self._store[1]

    def _download(self, info: ShardInfo, handle: int) -> None:
        """Write the shard to `handle`. What arrives damaged is fetched once more: it may have been the transfer."""
        size, found = -1, ""
        for _ in range(2):
            try:
                size, found = with_retries(partial(self._attempt, info, handle), self.patience)
            except TransferError as error:
                raise RunError(f"{error}: {self.fix}" if error.kind == "missing" else str(error)) from None
            if (size, found) == (info.bytes, info.xxh3_64):
                return
        raise RunError(
            f"{self.url}/{info.file}: damaged, or another file: expected {info.bytes} bytes with xxh3_64 "
            f"{info.xxh3_64}, found {size} with {found}, twice: {self.fix}"
        )

    def _attempt(self, info: ShardInfo, handle: int) -> tuple[int, str]:
        """Bytes and hash of what came; no more than the shard's size is written."""
        digest, size = xxhash.xxh3_64(), 0
        for block in self._open_store().blocks(info.file):
            digest.update(block)
            view, place = memoryview(block)[: max(info.bytes - size, 0)], size
            while view:
                written = os.pwrite(handle, view, place)
                view, place = view[written:], place + written
            size += len(block)
            if size > _TOO_LONG * info.bytes:
                break
        return size, digest.hexdigest()


def list_files(url: str, config: CacheConfig) -> list[str]:
    """Paths of the files below a URL, relative to it; of a web server none. Raises ConfigError or RunError."""
    files = RemoteFiles(url, config)
    try:
        return sorted(files.sizes([]))
    except RunError as error:
        raise ConfigError(str(error)) from None


def fetch_tokenizer(url: str, config: CacheConfig) -> Path:
    """A local copy of a tokenizer's folder in the config's cache, fetched once by this process.

    Raises ConfigError when it is not there or the server refuses one of its files, RunError when the server cannot be
    reached.
    """
    key = (url, config.cache_folder)
    copy = _tokenizers.get(key)
    if copy is None or not (copy / TOKENIZER_FILES[0]).exists():
        files = RemoteFiles(url, config)
        found = {TOKENIZER_FILES[0]: files.read(TOKENIZER_FILES[0])}
        for name in TOKENIZER_FILES[1:]:
            if (content := files.find(name)) is not None:
                found[name] = content
        copy = _tokenizers[key] = files.cache.keep("tokenizers", found)
    return copy


_tokenizers: dict[tuple[str, Path], Path] = {}
_prefetchers: dict[tuple[int, str, int], Prefetcher] = {}
_watched: set[int] = set()  # processes that close what was evicted


def _close_evicted() -> None:
    """What is evicted while it is open takes room until it is closed, and a process may have nothing to open for long
    (a loader worker whose batches wait, held-out streams between evaluations)."""
    while True:
        time.sleep(_LOOK_SECONDS)
        OPEN_SHARDS.close_unlinked()
        for prefetcher in list(_prefetchers.values()):
            prefetcher.close_unlinked()


def _forget_inherited() -> None:
    """In a fork, which has its own prefetchers."""
    for prefetcher in _prefetchers.values():
        prefetcher.close_inherited()
    _prefetchers.clear()
    _watched.clear()


os.register_at_fork(after_in_child=_forget_inherited)


def _named(info: ShardInfo) -> CachedShard:
    return CachedShard(info.xxh3_64, info.bytes)
