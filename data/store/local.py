"""A stream in a local folder, and what to say when the storage refuses a file."""

import errno
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.store.manifest import ShardInfo
from flexbert_core.schema import ConfigError, RunError

STAT_THREADS = 16
_GONE = (errno.ENOENT, errno.ENOTDIR)
_DENIED = (errno.EACCES, errno.EPERM)
_MANY = (errno.EMFILE, errno.ENFILE)


def what_failed(error: OSError, fix: str) -> str:
    """Why the storage refuses a file, and what to do. fix: for a file that is not there. Whatever else is refused may
    be whole."""
    if error.errno in _DENIED:
        fix = "give this user the right to read it"
    elif error.errno in _MANY:
        fix = "raise the limit of open files (ulimit -n); the file itself is not at fault"
    elif error.errno not in _GONE:
        fix = "see to the disk or the network that it lies on, and start again"
    return f"{error.strerror or error}: {fix}"


def refused(file: Path, error: OSError, fix: str) -> ConfigError | RunError:
    """What to raise for a file that cannot be read: a ConfigError where the user may not read it."""
    kind = ConfigError if error.errno in _DENIED else RunError
    return kind(f"{file}: {what_failed(error, fix)}")


class LocalFiles:
    """A stream in a local folder."""

    fix = "restore it, or delete the stream's folder and run prepare again"
    pool, max_open_bytes = "", math.inf

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str) -> bytes:
        file = self.path / name
        try:
            if not self.path.is_dir():
                raise ConfigError(
                    f"{self.path}: no such stream folder: run `python main.py prepare` first, or correct the path"
                )
            return file.read_bytes()
        except FileNotFoundError:
            raise ConfigError(
                f"{self.path}: not a finished stream (no {name}): run `python main.py prepare` to complete it"
            ) from None
        except OSError as error:
            raise refused(file, error, self.fix) from None

    def open(self, info: ShardInfo) -> int:
        try:
            return os.open(self.path / info.file, os.O_RDONLY)
        except OSError as error:
            raise RunError(f"{self.path / info.file}: {what_failed(error, self.fix)}") from None

    def head(self, info: ShardInfo, size: int) -> bytes:
        try:
            with os.fdopen(self.open(info), "rb") as file:
                return file.read(size)
        except OSError as error:
            raise RunError(f"{self.path / info.file}: {what_failed(error, self.fix)}") from None

    def check(self, infos: Sequence[ShardInfo]) -> None:
        def size(info: ShardInfo) -> int | OSError:
            try:
                return (self.path / info.file).stat().st_size
            except OSError as error:
                return error

        with ThreadPoolExecutor(STAT_THREADS) as pool:  # a network file system takes a millisecond for each
            for info, found in zip(infos, pool.map(size, infos, chunksize=64), strict=True):
                if found == info.bytes:
                    continue
                if not isinstance(found, OSError):
                    state = f"is {found} bytes long, expected {info.bytes} bytes: {self.fix}"
                elif found.errno in _GONE:
                    state = f"is missing: {self.fix}"
                else:
                    state = what_failed(found, self.fix)
                raise RunError(f"{self.path / info.file}: {state}")

    def prefetch(self, infos: Sequence[ShardInfo]) -> None:
        pass
