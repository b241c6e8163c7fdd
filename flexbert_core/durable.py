"""Writing that a crash cannot tear: a file or folder appears under its name whole and synced, or not at all.

Shared by every room, like flexbert_core/schema.py.
"""

import errno
import fcntl
import os
import shutil
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from flexbert_core.schema import RunError

UNFINISHED = ".unfinished-"


class HeldError(RunError):
    """Another process holds a lock."""


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Flush all that is below a folder, and the folder itself."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def lock(file: Path, owner: Path, doing: str) -> TextIO:
    """Take a lock that ends with the returned handle's `close`, or with this process however it dies.

    A POSIX record lock: children (loader workers) do not inherit it, so a killed parent never leaves it taken.
    Raises HeldError `OWNER: process N is DOING: ...` when another process holds it (with its host, where that is
    another), RunError when the file system has no locks.
    """
    handle = file.open("a+")
    here = f" on {socket.gethostname()}"
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.seek(0)
        written = handle.read().strip().removesuffix(here)
        handle.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise RunError(
                f"{file}: cannot be locked ({error.strerror}): mount its file system with locks (Lustre: -o flock), "
                "or choose a folder on another"
            ) from None
        who = f"process {written}" if written else "another process"  # it may not have written its number yet
        raise HeldError(f"{owner}: {who} is {doing}: wait for it to end, or stop it") from None
    handle.truncate(0)
    handle.write(f"{os.getpid()}{here}")
    handle.flush()
    return handle


def holder(file: Path) -> int | None:
    """The other process that holds the `lock` on a file, on whatever host it is; None: nobody. Takes nothing.

    Not for the process that holds it: closing a file ends all of the process's own locks on it (fcntl(2)).
    """
    if not file.exists():
        return None
    # struct flock of Linux: type, whence, start, length (0: to the end), pid
    layout = "hhqqi4x"
    with file.open("rb") as handle:
        question = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        try:
            kind, *_, pid = struct.unpack(layout, fcntl.fcntl(handle, fcntl.F_GETLK, question))
        except OSError:  # a file system without locks
            return None
    return None if kind == fcntl.F_UNLCK else pid


def write_file(path: Path, data: str | bytes) -> None:
    """Replace a file in one step. An OSError names it."""
    beside = path.with_name(UNFINISHED + path.name)
    with _naming(path):
        try:
            beside.write_bytes(data.encode() if isinstance(data, str) else data)
            sync(beside)
            beside.replace(path)
        except BaseException:  # a full disk, say
            beside.unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a folder beside `path` to fill; renames it to `path` when the block ends well, removes it when not.

    An older folder under `path` is moved aside just before, and removed after. An OSError names `path`.
    """
    beside, aside = (path.with_name(f"{UNFINISHED}{kind}{path.name}") for kind in ("", "old-"))
    for left in (beside, aside):
        shutil.rmtree(left, ignore_errors=True)
    with _naming(path):
        beside.mkdir(parents=True)
        try:
            yield beside
            sync_folder(beside)
            if path.exists():
                path.rename(aside)
            beside.rename(path)
            sync(path.parent)
            shutil.rmtree(aside, ignore_errors=True)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give an OSError of writing the name that the user knows: it says none, or an unfinished one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or UNFINISHED in str(error.filename)):
            error.filename = str(path)
        raise


def remove_folder(path: Path) -> None:
    """Delete a folder; it loses its name first, so an interrupted deletion leaves no half folder under it."""
    aside = path.with_name(f"{UNFINISHED}old-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed process left half written."""
    for left in folder.glob(UNFINISHED + "*"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()
