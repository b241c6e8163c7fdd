"""What a user without rights meets. Root may read everything."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NOBODY = 65534


@contextmanager
def as_nobody() -> Iterator[None]:
    """Run the block as another user where this one is root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def folder_of_all() -> Iterator[Path]:
    """A folder that every user may work in."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)
        for path in Path(folder).rglob("*"):
            if not path.is_symlink():
                path.chmod(0o755)
