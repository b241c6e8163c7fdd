"""What a source of documents is: it lists its work units, and reads the documents of one unit.

A unit (a file, a byte range of one, a row group, a range of rows) is the grain of parallel work and of resuming. The
units of a source, and the documents inside each, come in a fixed order: prepared data depends on nothing else.
"""

import gzip
import io
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import zstandard

from data.sources.files import File, is_remote, open_raw, reason
from schema import Registry, RunError

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


class ColumnSource(Source, Protocol):
    """A source whose documents come with named columns, which filters may ask for."""

    def check_columns(self, unit: Unit, names: Sequence[str]) -> None:
        """Raises ConfigError `no column ...` when the beginning of a unit shows that one is missing."""
        ...

    def read_columns(self, unit: Unit, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The documents of one unit in order, each with the values of these columns. Raises RunError like `read`."""
        ...


def file_unit(file: File) -> Unit:
    """A whole file as one unit."""
    return Unit(file.path, 0, file.bytes, file.bytes)


def line_units(file: File) -> list[Unit]:
    """A file of lines as units: byte ranges of a plain file, the whole of a compressed one."""
    if file.path.endswith(COMPRESSED_SUFFIXES):
        return [file_unit(file)]
    path, size = file
    starts = range(0, size, RANGE_BYTES)
    return [Unit(path, start, min(start + RANGE_BYTES, size), min(RANGE_BYTES, size - start)) for start in starts]


@contextmanager
def open_bytes(path: str) -> Iterator[Any]:
    """The decompressed content of a plain, .gz, .xz or .zst file."""
    with open_raw(path) as raw:
        if path.endswith(".gz"):
            yield gzip.open(raw, "rb")  # noqa: SIM115 (its only file is raw)
        elif path.endswith(".xz"):
            yield lzma.open(raw, "rb")  # noqa: SIM115
        elif path.endswith(".zst"):
            yield io.BufferedReader(_ZstdReader(raw), 2**20)
        else:
            yield raw


def read_bytes(path: str) -> bytes:
    """Decompressed content of a file. Raises RunError when it cannot be read or is damaged."""
    with readable(path), open_bytes(path) as file:
        return file.read()


def read_lines(unit: Unit) -> Iterator[bytes]:
    """The lines (with their ends) that start inside the unit. Raises RunError when the file is damaged."""
    with readable(unit.path), open_bytes(unit.path) as file:
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


class readable:
    """Turns what reading a damaged, missing or unreachable file raises into one line, a RunError."""

    def __init__(self, path: str, place: str = "") -> None:
        self.path, self.place = path, place

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        damage = isinstance(error, OSError | EOFError | lzma.LZMAError | zlib.error | zstandard.ZstdError)
        damage = damage or type(error).__module__.startswith("pyarrow")
        # A URL's client may raise anything.
        foreign = is_remote(self.path) and isinstance(error, Exception) and not isinstance(error, RunError)
        if error is not None and (damage or foreign):
            raise RunError(f"{self.path}: {self.place}cannot be read: {reason(self.path, error)}") from None


class _ZstdReader(io.RawIOBase):
    """All frames of a .zst file. zstandard's own reader takes a cut-off file for a finished one; this one raises."""

    def __init__(self, raw: Any) -> None:
        self._file = raw
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
