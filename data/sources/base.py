"""What a source of documents is: it lists its work units, and reads the documents of one unit.

A unit (a file, a byte range of one, a row group, a range of rows) is the grain of parallel work and of resuming. The
units of a source, and the documents inside each, come in a fixed order: prepared data depends on nothing else.
"""

import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import zstandard

from schema import ConfigError, Registry, RunError

SOURCES = Registry("source")

# Uncompressed files of lines are cut into units of this size, so that one large file keeps all workers busy.
RANGE_BYTES = 16 * 2**20
COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst")


class Unit(NamedTuple):
    """A piece of a source. What start and stop count (bytes, row groups, rows) is the source's own affair."""

    path: str
    start: int
    stop: int
    bytes: int
    """Size, for sharing out the work and for progress; need not be exact."""


class Source(Protocol):
    """An entry of SOURCES: built from its Config alone, in every worker anew."""

    def units(self) -> list[Unit]:
        """All units in document order. Raises ConfigError (`key: what is wrong`) when there is nothing to read."""
        ...

    def read(self, unit: Unit) -> Iterator[str]:
        """The documents of one unit in order. Raises RunError naming file and place when it cannot be read."""
        ...


def find_files(patterns: Sequence[str], suffixes: Sequence[str], ignore_dirs: Sequence[str] = ()) -> list[str]:
    """Files that the globs match (relative to the working directory), sorted, each once.

    A match that is a folder stands for all files below it with one of `suffixes`, less hidden files and `ignore_dirs`.
    Raises ConfigError when a pattern matches nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        files: list[str] = []
        for match in glob(os.path.expanduser(pattern), recursive=True):  # noqa: PTH111, PTH207 (strings, as given)
            if Path(match).is_file():
                files.append(match)
            else:
                files += _files_below(match, suffixes, ignore_dirs)
        if not files:
            raise ConfigError(f"paths: nothing matches {pattern!r} (looked from {Path.cwd()})")
        found.update(files)
    return sorted(found)


def _files_below(folder: str, suffixes: Sequence[str], ignore_dirs: Sequence[str]) -> Iterator[str]:
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in ignore_dirs and not name.startswith(".")]
        for name in names:
            if name.endswith(tuple(suffixes)) and not name.startswith("."):
                yield os.path.join(where, name)  # noqa: PTH118 (strings as the glob gave them)


def file_unit(path: str) -> Unit:
    """A whole file as one unit."""
    size = Path(path).stat().st_size
    return Unit(path, 0, size, size)


def line_units(path: str) -> list[Unit]:
    """A file of lines as units: byte ranges of a plain file, the whole of a compressed one."""
    if path.endswith(COMPRESSED_SUFFIXES):
        return [file_unit(path)]
    size = Path(path).stat().st_size
    starts = range(0, size, RANGE_BYTES)
    return [Unit(path, start, min(start + RANGE_BYTES, size), min(RANGE_BYTES, size - start)) for start in starts]


def open_bytes(path: str) -> io.BufferedIOBase | Any:
    """The decompressed content of a plain, .gz, .xz or .zst file."""
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".xz"):
        return lzma.open(path, "rb")
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstdReader(path), 2**20)
    return open(path, "rb")  # noqa: PTH123 (the path is a string)


def read_bytes(path: str) -> bytes:
    """Decompressed content of a file. Raises RunError when it cannot be read or is damaged."""
    with _readable(path), open_bytes(path) as file:
        return file.read()


def read_lines(unit: Unit) -> Iterator[bytes]:
    """The lines (with their ends) that start inside the unit. Raises RunError when the file is damaged."""
    with _readable(unit.path), open_bytes(unit.path) as file:
        if unit.path.endswith(COMPRESSED_SUFFIXES):
            yield from file
            return
        _seek_line(file, unit.start)
        while file.tell() < unit.stop:
            yield file.readline()


def line_number(unit: Unit, index: int) -> int:
    """Position in its file, from 1, of the line that read_lines(unit) gave as number `index`."""
    if unit.start == 0:
        return index + 1
    with open_bytes(unit.path) as file:
        first = _seek_line(file, unit.start)
        file.seek(0)
        return file.read(first).count(b"\n") + index + 1


def _seek_line(file: Any, start: int) -> int:
    """Go to the first line that begins at or after byte `start`."""
    if start:
        file.seek(start - 1)
        file.readline()
    return file.tell()


class _readable:
    """Turns what reading a damaged or missing file raises into one line."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, OSError | EOFError | lzma.LZMAError | zlib.error | zstandard.ZstdError):
            raise RunError(f"{self.path}: cannot be read: {error}") from None


class _ZstdReader(io.RawIOBase):
    """All frames of a .zst file. zstandard's own reader takes a cut-off file for a finished one; this one raises."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: PTH123, SIM115 (closed by close())
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._ready, self._started = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._frame.eof:
                block = self._frame.unused_data or self._file.read(2**18)
                self._frame, self._started = zstandard.ZstdDecompressor().decompressobj(), False
            else:
                block = self._file.read(2**18)
            if not block:
                if self._started:
                    raise EOFError("the compressed data ends early")
                return 0
            self._ready, self._started = self._frame.decompress(block), True
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
