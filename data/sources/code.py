"""Trees of source code."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from data.sources.base import SOURCES, Unit, file_unit, readable
from data.sources.files import find_files, open_raw
from schema import Component, Count

_SUFFIXES = [
    ".py",
    ".pyi",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".go",
    ".java",
    ".js",
    ".ts",
    ".rs",
    ".rb",
    ".sh",
    ".sql",
    ".md",
]


@SOURCES.register("code")
class Code:
    """One document per file. Files that are not UTF-8 text, or hold NUL bytes, are left out."""

    class Config(Component):
        name: Literal["code"] = "code"
        paths: list[str] = Field(min_length=1, description="folders, files or globs, also URLs")
        suffixes: list[str] = Field(_SUFFIXES, min_length=1)
        """Ends of the names of files that are taken."""
        ignore_dirs: list[str] = ["__pycache__", "node_modules", "site-packages", "build", "dist", "vendor"]
        """Folder names skipped at any depth; hidden folders always are."""
        max_file_bytes: Count = 10**6
        """Larger files (mostly generated) are left out."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def units(self) -> list[Unit]:
        units = map(file_unit, find_files(self.config.paths, self.config.suffixes, self.config.ignore_dirs))
        return [unit for unit in units if unit.bytes <= self.config.max_file_bytes]

    def read(self, unit: Unit) -> Iterator[str]:
        try:
            with readable(unit.path), open_raw(unit.path) as file:
                content = file.read()
            text = content.decode()
        except UnicodeDecodeError:
            return
        if "\0" not in text:
            yield text
