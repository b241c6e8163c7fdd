"""Trees of source code."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from data.sources.base import SOURCES, Unit, file_unit, find_files
from schema import Component, Count, RunError

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
        paths: list[str] = Field(min_length=1, description="folders, files or globs")
        suffixes: list[str] = Field(_SUFFIXES, min_length=1)
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
            text = Path(unit.path).read_bytes().decode()
        except UnicodeDecodeError:
            return
        except OSError as error:
            raise RunError(f"{unit.path}: cannot be read: {error.strerror}") from None
        if "\0" not in text:
            yield text
