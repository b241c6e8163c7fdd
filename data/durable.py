"""Files that are whole or not there, also after a kill or a power failure."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under its name only once all of it is on the disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    _sync(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring all files right below a folder, and the folder itself, to the disk."""
    for path in [*folder.iterdir(), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
