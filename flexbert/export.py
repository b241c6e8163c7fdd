"""A folder appears under its name when it is whole and on disk, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from schema import ConfigError

_EXPORT_FILES = ("config.json", "model.safetensors")


def publish(out_dir: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling of `out_dir`, flush it to disk, rename it.

    An earlier export under `out_dir` is moved aside first and removed afterwards; between the two renames neither is
    there, but a whole one always exists beside it. Raises ConfigError when `out_dir` is something else than an export;
    whatever `write` raises comes through, with the temporary folder removed.
    """
    if out_dir.exists() and not _is_export(out_dir) and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ConfigError(f"{out_dir}: exists and is not an export: choose another folder, or remove it")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        folder.chmod(0o755)  # mkdtemp makes private folders; an export is for others to read
        write(folder)
        for path in [*folder.rglob("*"), folder]:
            _flush(path)
        aside = None
        if _is_export(out_dir):
            aside = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
            out_dir.rename(aside)
        try:
            folder.rename(out_dir)
        except OSError:
            if aside is not None:
                aside.rename(out_dir)
            raise
        _flush(out_dir.parent)
        if aside is not None:
            shutil.rmtree(aside)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _is_export(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _EXPORT_FILES)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
