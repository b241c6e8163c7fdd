"""A bounded folder of downloaded shards, shared by all processes of a machine.

Files are named by the hash of their content, so nothing in the folder can be stale, and two datasets share what they
have in common. A download writes into `partial-...`, whose full size is claimed at once and which its process holds
locked: a partial file that nobody holds was left by a killed process, and is removed by whoever comes next. The least
recently opened files make room. A file may be removed while another process reads it: POSIX keeps it for that one.
"""

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from schema import ConfigError, RunError

_PARTIAL = "partial-"
_POLL_SECONDS = 0.05

Download = Callable[[int], None]
"""Writes the whole content to a descriptor, checked; raises otherwise."""


class ShardCache:
    """Files by content hash, below `folder`, of `limit` bytes together at most."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def check(self, largest: int, url: str) -> None:
        """Raises ConfigError when a shard of `largest` bytes cannot be held beside one that is being fetched, or the
        folder cannot be written to."""
        if self.limit < 2 * largest:
            raise ConfigError(
                f"data.remote.cache_limit: {self.limit:,} bytes cannot hold two of the largest shards of {url} "
                f"({largest:,} bytes): raise it"
            )
        self._make_folder()

    def has(self, name: str) -> bool:
        """Whether the file is there at this moment."""
        return (self.folder / name).exists()

    def open(self, name: str, size: int, download: Download) -> int:
        """A descriptor of the file, downloaded if it is not there, once for all processes that ask at the same time.

        name: hex digest of the content. Raises what `download` raises, RunError for a full disk.
        """
        path = self.folder / name
        found = self._open_whole(path, size)
        if found is not None:
            return found
        self._make_folder()
        with self._locked(f"locks/{name[:2]}"):
            found = self._open_whole(path, size)
            return self._fetch(path, size, download) if found is None else found

    def forget(self, name: str) -> None:
        """Remove a file whose content was found to be damaged."""
        (self.folder / name).unlink(missing_ok=True)

    def _make_folder(self) -> None:
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"data.remote.cache: {self.folder}: {error.strerror}: choose a folder that can be written"
            ) from None

    def _open_whole(self, path: Path, size: int) -> int | None:
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(handle).st_size != size:  # cut by a full disk, or by hand
            os.close(handle)
            path.unlink(missing_ok=True)
            return None
        with suppress(OSError):
            os.utime(handle)  # used now: the last to make room
        return handle

    def _fetch(self, path: Path, size: int, download: Download) -> int:
        partial = self.folder / f"{_PARTIAL}{path.name}-{os.getpid()}-{threading.get_ident()}"
        handle = self._claim(partial, size)
        try:
            download(handle)
            if os.fstat(handle).st_size != size:
                raise RunError(f"{path}: changed while it was written")
            partial.rename(path)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            os.close(handle)
            if isinstance(error, OSError) and error.errno is not None:
                raise RunError(
                    f"data.remote.cache: {self.folder}: {error.strerror}: make room, or lower cache_limit"
                ) from None
            raise
        os.close(handle)
        return os.open(path, os.O_RDONLY)

    def _claim(self, partial: Path, size: int) -> int:
        """Create a partial file of its full size as soon as the limit allows it; older files make room."""
        while True:
            with self._locked("lock"):
                if self._make_room(size):
                    handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                    fcntl.flock(handle, fcntl.LOCK_EX)
                    os.truncate(handle, size)
                    return handle
            time.sleep(_POLL_SECONDS)  # others are downloading as much as there is room for

    def _make_room(self, size: int) -> bool:
        whole: list[tuple[int, int, str]] = []
        total = 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if not entry.is_file():
                    continue
                if entry.name.startswith(_PARTIAL) and _abandoned(entry.path):
                    continue
                try:
                    facts = entry.stat()
                except FileNotFoundError:
                    continue
                total += facts.st_size
                if not entry.name.startswith(_PARTIAL) and entry.name != "lock":
                    whole.append((facts.st_mtime_ns, facts.st_size, entry.path))
        for _, freed, path in sorted(whole):
            if total + size <= self.limit:
                break
            Path(path).unlink(missing_ok=True)
            total -= freed
        return total + size <= self.limit

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # ends with the process that holds it
            yield
        finally:
            os.close(handle)


def _abandoned(path: str) -> bool:
    """True, and the file gone, when no process holds it."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        Path(path).unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True
