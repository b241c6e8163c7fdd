"""Writing that a crash cannot tear: a file or folder appears under its name whole and synced, or not at all.

Shared by every room, like schema.py.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished-"


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, data: str | bytes) -> None:
    """Replace a file in one step."""
    beside = path.with_name(UNFINISHED + path.name)
    beside.write_bytes(data.encode() if isinstance(data, str) else data)
    sync(beside)
    beside.replace(path)
    sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a folder beside `path` to fill; renames it to `path` when the block ends well, removes it when not.

    An older folder under `path` is moved aside just before, and removed after.
    """
    beside, aside = (path.with_name(f"{UNFINISHED}{kind}{path.name}") for kind in ("", "old-"))
    for left in (beside, aside):
        shutil.rmtree(left, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        for file in sorted(beside.rglob("*")):
            sync(file)
        sync(beside)
        if path.exists():
            path.rename(aside)
        beside.rename(path)
        sync(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
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
