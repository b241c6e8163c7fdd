"""Streams at URLs: shards are fetched whole, checked, into a cache on local disk, ahead of their use."""

import errno
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from pydantic import Field

from data.cache import ShardCache
from data.shards import ShardInfo
from data.sources.files import filesystem, open_raw, reason
from schema import ConfigError, RunError, Schema, Size

_BLOCK_BYTES = 8 * 2**20
_PREFETCH_THREADS = 4
_PREFETCH_SHARE = 0.25  # of the cache, fetched ahead and not yet used, per process
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds between attempts; doubled each time

Result = TypeVar("Result")


class RemoteConfig(Schema):
    """How streams at URLs are read."""

    cache: str | None = Field(
        default=None, description="local folder for fetched shards; default: flexbert in $XDG_CACHE_HOME or ~/.cache"
    )
    cache_limit: Size = Field(
        default=50 * 10**9, gt=0, description="bytes the folder may hold, all runs together: 50gb; oldest are dropped"
    )
    retries: int = Field(default=8, ge=0, description="attempts more when a server is busy or cannot be reached")

    @property
    def folder(self) -> Path:
        """The cache folder."""
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(self.cache or f"{base}/flexbert").expanduser()


class RemoteFiles:
    """The files of a stream at a URL that fsspec knows. Clients and threads belong to the process that made them."""

    def __init__(self, url: str, cache: ShardCache, retries: int) -> None:
        self.url, self.cache, self.retries = url.rstrip("/"), cache, retries
        self._prefetcher: _Prefetcher | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prefetcher": None}

    def read(self, name: str) -> bytes:
        url = f"{self.url}/{name}"
        try:
            return self._persist(url, lambda: _read_all(url))
        except FileNotFoundError:
            raise ConfigError(
                f"{self.url}: not a finished stream (no {name}): correct the URL, or prepare and upload it again"
            ) from None
        except Exception as error:  # each protocol's client has its own
            raise ConfigError(f"{url}: {reason(url, error)}") from None

    def open(self, info: ShardInfo) -> int:
        return self.cache.open(info.xxh3_64, info.bytes, lambda handle: self._download(info, handle))

    def repair(self, info: ShardInfo) -> bool:
        self.cache.forget(info.xxh3_64)
        return True

    def check(self, infos: Sequence[ShardInfo]) -> None:
        self.cache.check(max((info.bytes for info in infos), default=0), self.url)
        if self.url.startswith(("http://", "https://")):
            return  # a web server lists no sizes; a shard's is checked when it is fetched
        try:
            sizes = self._persist(self.url, self._list)
        except Exception as error:
            raise ConfigError(f"{self.url}: {reason(self.url, error)}") from None
        for info in infos:
            found = sizes.get(info.file)
            if found != info.bytes:
                state = "is missing" if found is None else f"is {found} bytes long, expected {info.bytes} bytes"
                raise RunError(f"{self.url}/{info.file}: {state}")

    def prefetch(self, infos: Sequence[ShardInfo]) -> None:
        if self._prefetcher is None or self._prefetcher.process != os.getpid():
            self._prefetcher = _Prefetcher(self)
        self._prefetcher.add(infos)

    def _list(self) -> dict[str, int]:
        system, place = filesystem(self.url)
        system.invalidate_cache()
        found = system.find(place, detail=True)
        start = len(place.rstrip("/")) + 1
        return {name[start:]: facts["size"] for name, facts in found.items()}

    def _download(self, info: ShardInfo, handle: int) -> None:
        """Fetch a shard into a file. Raises RunError when it cannot be had, or is not what the manifest says."""
        url = f"{self.url}/{info.file}"
        try:
            self._persist(url, lambda: _copy(url, info, handle))
        except RunError:
            raise
        except OSError as error:
            if error.errno is not None and not isinstance(error, FileNotFoundError) and _is_local(error):
                raise
            raise RunError(f"{url}: {reason(url, error)}") from None
        except Exception as error:
            raise RunError(f"{url}: {reason(url, error)}") from None

    def _persist(self, url: str, attempt: Callable[[], Result]) -> Result:
        """Repeat what fails for reasons that may pass: connections, time-outs, busy servers."""
        pause = _FIRST_PAUSE
        for left in range(self.retries, -1, -1):
            try:
                return attempt()
            except Exception as error:
                if left == 0 or not _may_pass(url, error):
                    raise
            time.sleep(pause * random.SystemRandom().uniform(0.5, 1.0))  # so that many readers do not come back at once
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("the last attempt returns or raises")


class _Prefetcher:
    """Background threads that fetch what was announced, as far as it may lie unused in the cache."""

    def __init__(self, files: RemoteFiles) -> None:
        self.files, self.process = files, os.getpid()
        self._queue: queue.SimpleQueue[ShardInfo] = queue.SimpleQueue()
        self._ahead: dict[str, int] = {}  # bytes of what is announced and was not there
        self._lock = threading.Lock()
        for _ in range(_PREFETCH_THREADS):
            threading.Thread(target=self._work, daemon=True, name="prefetch").start()

    def add(self, infos: Sequence[ShardInfo]) -> None:
        limit = _PREFETCH_SHARE * self.files.cache.limit
        with self._lock:
            for info in infos:
                if info.xxh3_64 in self._ahead or self.files.cache.has(info.xxh3_64):
                    continue
                if sum(self._ahead.values()) + info.bytes > limit:
                    return
                self._ahead[info.xxh3_64] = info.bytes
                self._queue.put(info)

    def _work(self) -> None:
        while True:
            info = self._queue.get()
            with suppress(Exception):  # whoever needs the shard tries again, and says what is wrong
                os.close(self.files.open(info))
            with self._lock:
                del self._ahead[info.xxh3_64]


def _read_all(url: str) -> bytes:
    with open_raw(url) as raw:
        return raw.read()


def _copy(url: str, info: ShardInfo, handle: int) -> None:
    digest, size = xxhash.xxh3_64(), 0
    os.lseek(handle, 0, os.SEEK_SET)
    with open_raw(url) as raw:
        while block := raw.read(_BLOCK_BYTES):
            size += len(block)
            if size > info.bytes:
                break
            digest.update(block)
            view = memoryview(block)
            while view:
                view = view[os.write(handle, view) :]
    if size != info.bytes or digest.hexdigest() != info.xxh3_64:
        longer = "more than " if size > info.bytes else ""
        raise RunError(
            f"{url}: damaged: expected {info.bytes} bytes with xxh3_64 {info.xxh3_64}, found {longer}{size} with "
            f"{digest.hexdigest()}"
        )


def _is_local(error: OSError) -> bool:
    """A full or failing local disk, not the network."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


_FINAL = (
    "ACCESS_DENIED",
    "NO_SUCH_BUCKET",
    "NO_SUCH_KEY",
    "RESOURCE_NOT_FOUND",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES",
)
_FINAL_STATUS = (400, 401, 403, 404, 410)


def _may_pass(url: str, error: Exception) -> bool:
    """Whether to try again."""
    if isinstance(error, RunError | ConfigError | FileNotFoundError | PermissionError):
        return False
    if isinstance(error, OSError) and _is_local(error):
        return False
    if getattr(error, "status", None) in _FINAL_STATUS:
        return False
    return not any(word in str(error) for word in _FINAL)


def remote_files(url: str, config: RemoteConfig) -> RemoteFiles:
    """The files of a stream at `url`."""
    return RemoteFiles(url, ShardCache(config.folder, config.cache_limit), config.retries)
