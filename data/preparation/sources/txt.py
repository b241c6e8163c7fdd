"""Plain text files."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

from pydantic import Field

from data.preparation.sources.base import (
    SOURCES,
    Listing,
    Unit,
    file_unit,
    line_number,
    line_units,
    listing,
    read_bytes,
    read_lines,
)
from data.preparation.sources.files import Fault, find_files
from data.preparation.sources.text import not_utf8, shown, to_text
from flexbert_core.schema import Component, RunError, UserPath

_BLANK_LINES = re.compile(r"\r?\n[ \t]*(?:\r?\n[ \t]*)+")


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
        if self.config.document == "line":
            for index, line in enumerate(read_lines(unit)):
                text = decode(line, partial(_line, unit, index))
                yield text if isinstance(text, Fault) else text.rstrip("\r\n")
            return
        text = decode(read_bytes(unit.path), lambda: unit.path)
        if self.config.document == "paragraph" and not isinstance(text, Fault):
            yield from filter(None, _BLANK_LINES.split(text.strip("\r\n")))
        else:
            yield text


def decode(content: bytes, place: Callable[[], str]) -> str | Fault:
    """UTF-8 to text. A NUL byte is a fault: what holds one is UTF-16, or no text at all. place: for its message."""
    try:
        text = to_text(content)
    except UnicodeDecodeError as error:
        return Fault("not UTF-8", partial(_error, place, not_utf8(content, error)))
    if "\0" in text:
        return Fault("NUL bytes", partial(_error, place, "holds NUL bytes: UTF-16, or no text: convert it first"))
    return text


def _error(place: Callable[[], str], message: str) -> RunError:
    return RunError(f"{shown(place())}: {message}")


def _line(unit: Unit, index: int) -> str:
    return f"{unit.path}:{line_number(unit, index)}"
