"""A folder of shards on local disk that many processes share, never larger than its limit.

A shard is one file, named by its hash and size, so other content is another file. All state is in the folder, and
survives kill -9 without repair:

- SHARD.partial: being downloaded by whoever holds its lock, and as long as it will be, so that its room is taken.
  Without a lock it is left over from a dead process, and the next one to need room removes it.
- SHARD: whole. Its time of modification is that of its last opening, or of a look at it in use later: the least
  recently used go first. A shared lock says that a process holds it open; such shards go last. Whoever is reading one
  goes on (POSIX), and closes it within a second: so long it takes room that is not counted.
- lock: held by the one process that counts and makes room.

The locks are flock's: they belong to an open file and end with it, however its process dies.
"""

import errno
import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, NamedTuple

import xxhash
from pydantic import AfterValidator, Field

from flexbert_core.durable import new_folder
from flexbert_core.schema import MAY_CHANGE, ConfigError, RunError, Schema, Size, UserPath

log = logging.getLogger(__name__)

PARTIAL = ".partial"
_WARN_SECONDS = 60.0
_POLL = 0.02  # seconds between looks at what another process is doing
_SLACK = 8  # whoever fetches ahead of use leaves 1/8 of the limit to what is used now
_READ_BYTES = 1 << 20


def _cache_home() -> Path:
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a container's user that has no home
        return Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"


def _local(folder: str) -> str:
    if "://" in folder:
        raise ValueError(f"expected a folder on local disk, got {folder!r}")
    return folder


class CacheConfig(Schema):
    """How remote streams are fetched and kept. Changes nothing that a run trains on."""

    cache: Annotated[UserPath, AfterValidator(_local)] = Field(
        default_factory=lambda: str(_cache_home() / "flexbert"),
        description="folder on local disk for shards of remote streams (URLs); runs may share it; default: flexbert in "
        "$XDG_CACHE_HOME, else in ~/.cache",
        json_schema_extra=MAY_CHANGE,
    )
    cache_limit: Size = Field(
        default=50 * 10**9,
        gt=0,
        description="bytes that it may hold; should be over lanes of the node x shuffle_shards x shard size",
        json_schema_extra=MAY_CHANGE,
    )
    download_retries: int = Field(
        default=8,
        ge=0,
        description="more attempts after a lost connection, timeout, 429 or 5xx, ever further apart",
        json_schema_extra=MAY_CHANGE,
    )
    download_timeout: float = Field(
        default=30.0,
        gt=0,
        description="seconds without a byte until an attempt failed, of S3 and http(s); other protocols' clients have "
        "limits of their own",
        json_schema_extra=MAY_CHANGE,
    )

    @property
    def cache_folder(self) -> Path:
        """`cache`."""
        return Path(self.cache)


class CachedShard(NamedTuple):
    """What names a shard in the cache: the xxh3_64 (hex) and the size of its content."""

    xxh3_64: str
    bytes: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.xxh3_64}-{self.bytes}"


_File = tuple[int, int, str]  # when it was last opened, ns; bytes; name


class ShardCache:
    """The cache as this process sees it. Any number of threads may use it."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Touches nothing; the folder is made when the first shard comes."""
        self.folder, self.limit = folder, limit
        self._verified: dict[str, int] = {}  # inode of what this process has hashed

    def check_fits(self, shards: "list[CachedShard]", where: str) -> None:
        """Raises ConfigError when the largest of the shards is over the limit, or the folder cannot be written. Removes
        what dead processes left."""
        largest = max((shard.bytes for shard in shards), default=0)
        if largest > self.limit:
            raise ConfigError(
                f"data.cache_limit: {self.limit:,} bytes is less than the largest shard of {where}, {largest:,} bytes: "
                "raise it to several times that"
            )
        if self.folder.exists():
            with _plain_errors(self.folder), self._counting():
                self._scan()

    def has(self, shard: CachedShard) -> bool:
        """Whether the shard is there (unchecked). Counts as a use: it will be among the last to go."""
        try:
            os.utime(self.folder / shard.name)
        except OSError:
            return False
        return True

    def open(self, shard: CachedShard, download: Callable[[int], None], ahead: bool = False) -> int | None:
        """A descriptor of the whole shard, whose content was hashed by this process once; the caller closes it.

        download: writes the shard to a descriptor and returns when size and hash are right, else raises. Called when
        the shard is not there, or not what its name says; never in two processes at once.
        ahead: do not wait for other processes and do not take the room of shards in use: give None instead.
        Raises ConfigError or RunError when the folder cannot be written, and what `download` raises.
        """
        if shard.bytes > self.limit:
            self.check_fits([shard], "the stream")
        start, warned = time.monotonic(), False
        with _plain_errors(self.folder):
            while True:
                try:
                    handle = self._open_whole(shard)
                    if handle is None and (partial := self._claim(shard)) is not None:
                        handle = self._fill(shard, partial, download, ahead)
                    if handle is not None or ahead:
                        return handle
                except FileNotFoundError:  # someone has emptied the cache
                    self.folder.mkdir(parents=True, exist_ok=True)
                if not warned and time.monotonic() - start > _WARN_SECONDS:
                    log.warning("%s: another process has been downloading %s for long", self.folder, shard.name)
                    warned = True
                time.sleep(_POLL)

    def keep(self, kind: str, files: Mapping[str, bytes]) -> Path:
        """A folder with these small files, named by their content; it stays, and is not counted."""
        digest = xxhash.xxh3_64()
        for name, content in sorted(files.items()):
            digest.update(f"{name} {len(content)} ".encode() + content)
        path = self.folder / kind / digest.hexdigest()
        with _plain_errors(self.folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._counting():
                if not all((path / name).is_file() and (path / name).read_bytes() == files[name] for name in files):
                    with new_folder(path) as folder:
                        for name, content in files.items():
                            (folder / name).write_bytes(content)
        return path

    def _open_whole(self, shard: CachedShard) -> int | None:
        path = self.folder / shard.name
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            with suppress(BlockingIOError):  # whoever holds it alone is about to remove it: it stays readable
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            facts = os.fstat(handle)
            verified = self._verified.get(shard.name) == facts.st_ino
            if facts.st_size != shard.bytes or not (verified or _digest(handle) == shard.xxh3_64):
                self._remove_damaged(path, facts.st_ino)
                os.close(handle)
                return None
            self._verified[shard.name] = facts.st_ino
            with suppress(PermissionError):  # another user's cache
                os.utime(handle)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _remove_damaged(self, path: Path, inode: int) -> None:
        with self._counting(), suppress(FileNotFoundError):
            if path.stat().st_ino == inode:
                path.unlink()

    def _claim(self, shard: CachedShard) -> int | None:
        """The shard's partial file, locked; None when another process or thread has it."""
        path = self._partial(shard)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _exclusive.add(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(handle).st_ino:
                return handle
        except BlockingIOError:
            pass
        except BaseException:
            _release(handle)
            raise
        _release(handle)
        return None

    def _fill(self, shard: CachedShard, partial: int, download: Callable[[int], None], ahead: bool) -> int | None:
        """Download into the claimed file and give it its name. None: it is there by now, or there is no room ahead."""
        path, reader = self._partial(shard), None
        try:
            if (self.folder / shard.name).exists() or not self._take_room(shard, partial, ahead):
                path.unlink(missing_ok=True)
                return None
            download(partial)
            reader = os.open(path, os.O_RDONLY)  # before others can see, and remove, the whole file
            self._verified[shard.name] = os.fstat(reader).st_ino
            with self._counting():  # else a scan sees the old name, finds it gone and leaves the file out of its sum
                path.rename(self.folder / shard.name)
        except BaseException:
            if reader is not None:
                os.close(reader)
            path.unlink(missing_ok=True)
            raise
        finally:
            _release(partial)
        fcntl.flock(reader, fcntl.LOCK_SH)
        return reader

    def _take_room(self, shard: CachedShard, partial: int, ahead: bool) -> bool:
        """Make the claimed file as long as the shard, once the folder has room for it. False: not without harm."""
        while True:
            with self._counting():
                os.ftruncate(partial, 0)
                used, files = self._scan()
                if self._evict(used + shard.bytes - self.limit, files, ahead):
                    os.ftruncate(partial, shard.bytes)
                    return True
            if ahead:
                return False
            time.sleep(_POLL)  # until the downloads of others end and their files can go

    def _evict(self, excess: int, files: list[_File], ahead: bool) -> bool:
        """Remove least recently opened files of at least `excess` bytes, those in use last (never, if `ahead`)."""
        if excess <= 0:
            return True
        chosen, in_use, room, spare = [], [], 0, self.limit // _SLACK if ahead else 0
        for _, size, name in sorted(files):
            if room >= excess + spare:
                break
            if _in_use(self.folder / name):
                in_use.append((size, name))
                continue
            if room < excess:
                chosen.append(name)
            room += size
        if not ahead:
            for size, name in in_use:
                if room >= excess:
                    break
                chosen.append(name)
                room += size
        if room < excess + spare:
            return False
        for name in chosen:
            (self.folder / name).unlink(missing_ok=True)
        return True

    def _scan(self) -> tuple[int, list[_File]]:
        """Bytes taken, and the whole shards. Removes the partial files of dead processes."""
        used, files = 0, []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                name = entry.name
                if "-" not in name or (name.endswith(PARTIAL) and not _in_use(self.folder / name, remove=True)):
                    continue
                try:
                    facts = entry.stat()
                except FileNotFoundError:
                    continue
                used += facts.st_size
                if not name.endswith(PARTIAL):
                    files.append((facts.st_mtime_ns, facts.st_size, name))
        return used, files

    def _partial(self, shard: CachedShard) -> Path:
        return self.folder / f"{shard.name}{PARTIAL}"

    @contextmanager
    def _counting(self) -> Iterator[None]:
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        _exclusive.add(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            _release(handle)


def _in_use(path: Path, remove: bool = False) -> bool:
    """Whether anyone has a lock on the file. remove: if not, remove it before anyone can take one."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if remove:
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _digest(handle: int) -> str:
    digest, place = xxhash.xxh3_64(), 0
    while block := os.pread(handle, _READ_BYTES, place):
        digest.update(block)
        place += len(block)
    return digest.hexdigest()


# A lock lasts until its last descriptor is closed, and a fork copies descriptors: children drop the exclusive ones, so
# that they end with the process that took them.
_exclusive: set[int] = set()


def _release(handle: int) -> None:
    _exclusive.discard(handle)
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def _drop_inherited() -> None:
    while _exclusive:
        with suppress(OSError):
            os.close(_exclusive.pop())


os.register_at_fork(after_in_child=_drop_inherited)


@contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise ConfigError(f"data.cache: {folder}: {error.strerror}: give a folder that can be written") from None
    except OSError as error:
        fix = ": free some, or lower data.cache_limit" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise RunError(f"data.cache: {folder}: {error.strerror or error}{fix}") from None
