"""The shards that this process holds open, of all its streams: so many at most, and of a cache so many bytes."""

import os
import resource
import threading
import weakref
from collections import Counter, OrderedDict
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

_MOST = 1024
_SHARE = 4  # a process holds 1/4 of the files that it may open


class _Owner(Protocol):
    opened: dict[int, "OpenShard"]


class OpenShard:
    """Descriptor and offsets of a shard. The descriptor is closed when nobody refers to this any more: whoever reads
    from it keeps it open meanwhile."""

    def __init__(self, handle: int, offsets: NDArray[np.uint32]) -> None:
        self.handle, self.offsets = handle, offsets
        self.number = -1
        self.used = False  # since the last look at what was unlinked

    def __del__(self, close: Any = os.close) -> None:
        close(self.handle)


class _Held(NamedTuple):
    """Of a shard that is or was open. A stream that is forgotten takes its open shards along."""

    opened: "weakref.ref[OpenShard]"
    owner: "weakref.ref[_Owner]"
    shard: int
    pool: str
    bytes: int


class OpenShards:
    """All open shards of a process, least recently used first. `opened` of a stream holds them; what has to go is taken
    out of it. A pool is a cache's folder, or "" for files that lie in place. Any number of threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[int, _Held] = OrderedDict()
        self._bytes = Counter[str]()
        self._next = 0

    @cached_property
    def limit(self) -> int:
        """Shards that may be open. The first look raises the process's limit of open files to what that needs, as far
        as it may."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _SHARE * _MOST if hard == resource.RLIM_INFINITY else min(hard, _SHARE * _MOST)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                soft = wanted
        return _MOST if soft == resource.RLIM_INFINITY else max(1, min(_MOST, soft // _SHARE))

    def touch(self, opened: OpenShard) -> None:
        """It is used now."""
        opened.used = True
        with self._lock:
            if opened.number in self._held:  # else closed by another thread
                self._held.move_to_end(opened.number)

    def make_room(self, pool: str, size: int, most: float) -> None:
        """Close shards until one more of `size` bytes may be opened. most: bytes of this pool that may be open; one
        shard always may."""
        with self._lock:
            while len(self._held) >= self.limit:
                self._drop(next(iter(self._held)))
            if self._bytes[pool] + size > most:
                for number in [number for number, held in self._held.items() if held.pool == pool]:
                    self._drop(number)
                    if self._bytes[pool] + size <= most:
                        break

    def add(self, opened: OpenShard, owner: _Owner, shard: int, pool: str, size: int) -> None:
        """It was opened for this stream."""
        with self._lock:
            opened.number, self._next = self._next, self._next + 1
            owner.opened[shard] = opened
            self._held[opened.number] = _Held(weakref.ref(opened), weakref.ref(owner), shard, pool, size)
            self._bytes[pool] += size

    def close_unlinked(self) -> None:
        """Close shards that were removed from their cache: they take room until the last process has closed them. Those
        that are in use are marked as used now, so that others go before them."""
        with self._lock:
            found = [(number, held.opened()) for number, held in self._held.items() if held.pool]
        for number, opened in found:
            if opened is None or os.fstat(opened.handle).st_nlink == 0:
                with self._lock:
                    self._drop(number)
            elif opened.used:
                opened.used = False
                with suppress(OSError):  # another user's cache
                    os.utime(opened.handle)

    def forget_inherited(self) -> None:
        """In a fork: its copies of the descriptors would keep room taken, and shards in use, for its parent."""
        self._lock = threading.Lock()
        for number in list(self._held):
            self._drop(number)

    def _drop(self, number: int) -> None:
        held = self._held.pop(number, None)
        if held is None:
            return
        self._bytes[held.pool] -= held.bytes
        owner, opened = held.owner(), held.opened()
        if owner is not None and opened is not None and owner.opened.get(held.shard) is opened:
            del owner.opened[held.shard]


OPEN_SHARDS = OpenShards()

os.register_at_fork(after_in_child=OPEN_SHARDS.forget_inherited)
