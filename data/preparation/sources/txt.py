"""Plain text files."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

from pydantic import Field

from data.preparation.sources.base import (
    SOURCES,
    LineError,
    Listing,
    Unit,
    file_unit,
    line_units,
    listing,
    read_bytes,
    read_lines,
)
from data.preparation.sources.files import Fault, find_files
from data.preparation.sources.text import not_utf8, shown, to_text
from flexbert_core.schema import Component, RunError, UserPath


@SOURCES.register("txt")
class Txt:
    """UTF-8 text, plain or .gz, .bz2, .xz, .zst; a document is a file, a paragraph (between blank lines) or a line."""

    class Config(Component):
        name: Literal["txt"] = "txt"
        paths: list[UserPath] = Field(min_length=1, description="files, folders (all *.txt below) or globs, also URLs")
        document: Literal["file", "paragraph", "line"] = "file"
        """What one document is: a whole file, what stands between blank lines, or a line."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def find(self) -> Listing:
        by_line = self.config.document == "line"
        found = find_files(self.config.paths, [".txt"])
        return listing(found, line_units if by_line else lambda file: [file_unit(file)])

    def read(self, unit: Unit) -> Iterator[str | Fault]:
        if self.config.document == "file":
            yield decode(read_bytes(unit.path), partial(_error, unit))
            return
        by_line = self.config.document == "line"
        for index, content in enumerate(read_lines(unit)) if by_line else _paragraphs(unit):
            text = decode(content, partial(_line_error, unit, index))
            text = text if isinstance(text, Fault) else text.rstrip("\r\n")
            if text or by_line:  # a paragraph may be a byte-order mark alone
                yield text


def _paragraphs(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """What stands between blank lines, and the number of its first line in the unit: one at a time, for a file may be
    larger than memory."""
    first, lines = 0, list[bytes]()
    for index, line in enumerate(read_lines(unit)):
        if line.strip(b" \t\r\n"):
            first = first if lines else index
            lines.append(line)
        elif lines:
            yield first, b"".join(lines)
            lines = []
    if lines:
        yield first, b"".join(lines)


def decode(content: bytes, error: Callable[[str], RunError]) -> str | Fault:
    """UTF-8 to text. A NUL byte is a fault: what holds one is UTF-16, or no text at all. error: of a message."""
    try:
        text = to_text(content)
    except UnicodeDecodeError as fault:
        return Fault("not UTF-8", partial(error, not_utf8(content, fault)))
    if "\0" in text:
        return Fault("NUL bytes", partial(error, "holds NUL bytes: UTF-16, or no text: convert it first"))
    return text


def _error(unit: Unit, message: str) -> RunError:
    return RunError(f"{shown(unit.path)}: {message}")


def _line_error(unit: Unit, index: int, message: str) -> RunError:
    return LineError(unit.path, unit.start, index, message)
