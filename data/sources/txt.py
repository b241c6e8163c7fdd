"""Plain text files."""

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from data.sources.base import (
    COMPRESSED_SUFFIXES,
    SOURCES,
    Unit,
    file_unit,
    line_units,
    read_bytes,
    read_lines,
)
from data.sources.files import find_files
from schema import Component, RunError

_BLANK_LINES = re.compile(r"\r?\n[ \t]*(?:\r?\n[ \t]*)+")


@SOURCES.register("txt")
class Txt:
    """UTF-8 text, plain or .gz, .xz, .zst; a document is a file, a paragraph (between blank lines) or a line."""

    class Config(Component):
        name: Literal["txt"] = "txt"
        paths: list[str] = Field(min_length=1, description="files, folders (all *.txt below) or globs, also URLs")
        document: Literal["file", "paragraph", "line"] = "file"
        """What one document is: a whole file, what stands between blank lines, or a line."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def units(self) -> list[Unit]:
        files = find_files(self.config.paths, [".txt", *(".txt" + suffix for suffix in COMPRESSED_SUFFIXES)])
        if self.config.document == "line":
            return [unit for file in files for unit in line_units(file)]
        return [file_unit(file) for file in files]

    def read(self, unit: Unit) -> Iterator[str]:
        if self.config.document == "line":
            for line in read_lines(unit):
                yield decode(line, unit.path).rstrip("\r\n")
            return
        text = decode(read_bytes(unit.path), unit.path)
        if self.config.document == "paragraph":
            yield from filter(None, _BLANK_LINES.split(text.strip("\r\n")))
        else:
            yield text


def decode(content: bytes, path: str) -> str:
    """UTF-8 to text, without a byte-order mark. Raises RunError naming the file."""
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from None
