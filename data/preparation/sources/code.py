"""Trees of source code."""

from collections import Counter
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from data.preparation.sources.base import SOURCES, Listing, Unit, file_unit, listing, readable
from data.preparation.sources.files import Fault, find_files, open_raw
from data.preparation.sources.text import to_text
from flexbert_core.schema import Component, Count, UserPath

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
    """One document per file. Files that are not UTF-8 text, or hold NUL bytes, are left out, and counted."""

    class Config(Component):
        name: Literal["code"] = "code"
        paths: list[UserPath] = Field(min_length=1, description="folders, files or globs, also URLs")
        suffixes: list[str] = Field(_SUFFIXES, min_length=1)
        """Ends of the names of files that are taken, in any letter case."""
        ignore_dirs: list[str] = ["__pycache__", "node_modules", "site-packages", "build", "dist", "vendor"]
        """Folder names skipped at any depth; hidden folders always are."""
        max_file_bytes: Count = 10**6
        """Larger files (mostly generated) are left out."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def find(self) -> Listing:
        found = find_files(self.config.paths, self.config.suffixes, self.config.ignore_dirs, compressed=None)
        most = self.config.max_file_bytes
        large = Counter("over max_file_bytes" for file in found.files if file.bytes > most)
        left_out = found.left_out + large
        return listing(found._replace(left_out=left_out), lambda file: [file_unit(file)] if file.bytes <= most else [])

    def read(self, unit: Unit) -> Iterator[str | Fault]:
        with readable(unit.path), open_raw(unit.path) as file:
            content = file.read()
        try:
            text = to_text(content)
        except UnicodeDecodeError:
            yield Fault("not UTF-8")
            return
        yield Fault("NUL bytes") if "\0" in text else text
