"""What a source of documents is: it lists its work units, and reads the documents of one unit.

A unit (a file, a byte range of one, a row group, a range of rows) is the grain of parallel work and of resuming. The
units of a source, and the documents inside each, come in a fixed order: prepared data depends on nothing else.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import zstandard

from data.preparation.sources.files import Fault, File, Found, open_raw, reason
from data.preparation.sources.kinds import compression_of
from data.preparation.sources.local import wrong_content
from data.preparation.sources.text import shown
from data.store.transfer import is_url
from flexbert_core.schema import Registry, RunError

SOURCES = Registry("source", has_imports=False)

# Uncompressed files of lines are cut into units of this size, so that one large file keeps all workers busy.
RANGE_BYTES = 16 * 2**20

_COUNTED_BYTES = 2**20
# Counting the lines before this place of a URL would be a long download for one message.
_REMOTE_BYTES = 2**30


class Unit(NamedTuple):
    """A piece of a source. What start and stop count (bytes, row groups, rows) is the source's own affair."""

    path: str
    start: int
    stop: int
    bytes: int
    """Size, for sharing out the work and for progress; need not be exact."""


class Listing(NamedTuple):
    """What a source holds."""

    units: list[Unit]
    """In document order."""
    files: list[File]
    """What the units were made from; a dataset records them, to notice when they have changed."""
    left_out: Counter[str]
    """Files, and folders not looked into, that the source leaves out by its own rules: how many for which reason."""
    faults: list[Fault]
    """Files that should be read and cannot be."""


class DamagedError(RunError):
    """What is left of a unit cannot be read, because of what its file holds. reason: as in a Fault."""

    def __init__(self, message: str, reason: str = "damaged file") -> None:
        super().__init__(message)
        self.reason = reason


class LineError(RunError):
    """What is wrong with a line of a file, named by its number.

    The number costs reading the file up to there, so it is found when the message is asked for. Until then the error
    is its `args`, which JSON can hold.
    """

    def __init__(self, path: str, start: int, index: int, message: str) -> None:
        """Of the line that read_lines gives as number `index` of a unit of this path and start."""
        super().__init__(path, start, index, message)
        self.path, self.start, self.index, self.message = path, start, index, message

    def __str__(self) -> str:
        return self._said

    @cached_property
    def _said(self) -> str:
        place = f"{shown(self.path)}: line {self.index + 1} from byte {self.start:,} on"
        if self.start < _REMOTE_BYTES or not is_url(self.path):
            # The file may be gone by now, and a URL's client may raise anything.
            with suppress(Exception):
                place = f"{shown(self.path)}:{_lines_before(self.path, self.start) + self.index + 1}"
        return f"{place}: {self.message}"


class Source(Protocol):
    """An entry of SOURCES: built from its Config alone, in every worker anew."""

    def find(self) -> Listing:
        """All that there is. Raises ConfigError (`key: what is wrong`) when there is nothing to read, or something can
        be neither read nor passed over (a locked folder)."""
        ...

    def read(self, unit: Unit) -> Iterator[str | Fault]:
        """The documents of one unit in order, and a Fault in place of what cannot be one.

        Raises DamagedError when the rest of the unit cannot be read for what it holds, RunError when the storage fails.
        Both name file and place.
        """
        ...


class ColumnSource(Source, Protocol):
    """A source whose documents come with named columns, which filters may ask for."""

    def check_columns(self, unit: Unit, names: Sequence[str]) -> None:
        """Raises ConfigError `no column ...` when the beginning of a unit shows that one is missing."""
        ...

    def read_columns(self, unit: Unit, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]] | Fault]:
        """The documents of one unit in order, each with the values of these columns, or a Fault. Raises like `read`."""
        ...


def texts(rows: Iterator[tuple[str, dict[str, Any]] | Fault]) -> Iterator[str | Fault]:
    """What `read` gives, of what `read_columns` gives."""
    return (row if isinstance(row, Fault) else row[0] for row in rows)


def listing(found: Found, units_of: Callable[[File], list[Unit]]) -> Listing:
    """The units of files, less those of no bytes."""
    left_out = found.left_out + Counter("0 bytes" for file in found.files if file.bytes == 0)
    units = [unit for file in found.files if file.bytes for unit in units_of(file)]
    return Listing(units, found.files, left_out, found.faults)


def file_unit(file: File) -> Unit:
    """A whole file as one unit."""
    return Unit(file.path, 0, file.bytes, file.bytes)


def line_units(file: File) -> list[Unit]:
    """A file of lines as units: byte ranges of a plain file, the whole of a compressed one."""
    if compression_of(file.path):
        return [file_unit(file)]
    path, size, _ = file
    starts = range(0, size, RANGE_BYTES)
    return [Unit(path, start, min(start + RANGE_BYTES, size), min(RANGE_BYTES, size - start)) for start in starts]


@contextmanager
def open_bytes(path: str) -> Iterator[Any]:
    """The decompressed content of a plain, .gz, .bz2, .xz or .zst file. Raises DamagedError when it is none of that."""
    suffix = compression_of(path)
    with open_raw(path) as raw:
        if is_url(path):  # of local files this was seen when they were found
            wrong = wrong_content(path, raw.read(16))
            if wrong is not None:
                raise DamagedError(f"{shown(path)}: {wrong}", "content is not of its suffix")
            raw.seek(0)
        if suffix == ".gz":
            yield gzip.open(raw, "rb")  # noqa: SIM115 (its only file is raw)
        elif suffix == ".bz2":
            yield bz2.open(raw, "rb")  # noqa: SIM115
        elif suffix == ".xz":
            yield lzma.open(raw, "rb")  # noqa: SIM115
        elif suffix == ".zst":
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
        if compression_of(unit.path):
            yield from file
            return
        _seek_line(file, unit.start)
        while file.tell() < unit.stop:
            yield file.readline()


def _lines_before(path: str, start: int) -> int:
    """How many lines of a file stand before the first that begins at or after byte `start`."""
    if start == 0:
        return 0
    lines = 0
    with open_bytes(path) as file:
        left = _seek_line(file, start)
        file.seek(0)
        while block := file.read(min(left, _COUNTED_BYTES)):
            lines += block.count(b"\n")
            left -= len(block)
    return lines


def _seek_line(file: Any, start: int) -> int:
    """Go to the first line that begins at or after byte `start`."""
    if start:
        file.seek(start - 1)
        file.readline()
    return file.tell()


class readable:
    """Turns what reading a file raises into one line: a DamagedError where it is for what it holds, a RunError where it
    is missing, locked or cannot be reached."""

    def __init__(self, path: str, place: str = "") -> None:
        self.path, self.place = path, place

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None or isinstance(error, RunError):
            return
        arrow = type(error).__module__.startswith("pyarrow")
        packing = isinstance(error, EOFError | lzma.LZMAError | zlib.error | zstandard.ZstdError | gzip.BadGzipFile)
        # bz2 and pyarrow raise OSErrors that the system does not know.
        foreign = isinstance(error, OSError) and error.errno is None and not is_url(self.path)
        message = f"{shown(self.path)}: {self.place}cannot be read: {reason(self.path, error)}"
        if packing or arrow or foreign:
            raise DamagedError(message) from None
        # A URL's client may raise anything.
        if isinstance(error, OSError) or (is_url(self.path) and isinstance(error, Exception)):
            raise RunError(message) from None


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
