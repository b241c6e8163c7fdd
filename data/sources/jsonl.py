"""JSON lines."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import orjson
from pydantic import Field

from data.sources.base import COMPRESSED_SUFFIXES, SOURCES, Unit, line_number, line_units, read_lines
from data.sources.files import find_files
from schema import Component, ConfigError, RunError, did_you_mean


@SOURCES.register("jsonl")
class Jsonl:
    """One JSON object a line, plain or .gz, .xz, .zst; the document is one of its columns."""

    class Config(Component):
        name: Literal["jsonl"] = "jsonl"
        paths: list[str] = Field(min_length=1, description="files, folders (all *.jsonl below) or globs, also URLs")
        text_column: str = "text"
        """The column that holds the document."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def units(self) -> list[Unit]:
        files = find_files(self.config.paths, [".jsonl", *(".jsonl" + suffix for suffix in COMPRESSED_SUFFIXES)])
        return [unit for file in files for unit in line_units(file)]

    def check_columns(self, unit: Unit, names: Sequence[str]) -> None:
        """Looks at the first row."""
        for _, row in self._rows(unit):
            for name in names:
                if isinstance(row, dict) and name not in row:
                    raise ConfigError(f"no column {name!r} in {unit.path}, {did_you_mean(name, row)}")
            return

    def read(self, unit: Unit) -> Iterator[str]:
        return (text for text, _ in self.read_columns(unit, ()))

    def read_columns(self, unit: Unit, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        column = self.config.text_column
        for index, row in self._rows(unit):
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                raise RunError(f"{unit.path}:{line_number(unit, index)}: {_fault(row, column)}")
            for name in names:
                if name not in row:
                    raise RunError(
                        f"{unit.path}:{line_number(unit, index)}: no column {name!r}, {did_you_mean(name, row)}"
                    )
            yield row[column], {name: row[name] for name in names}

    def _rows(self, unit: Unit) -> Iterator[tuple[int, Any]]:
        for index, line in enumerate(read_lines(unit)):
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            if not line:
                continue
            try:
                yield index, orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise RunError(f"{unit.path}:{line_number(unit, index)}: not valid JSON: {error}") from None


def _fault(row: object, column: str) -> str:
    if not isinstance(row, dict):
        return f"expected a JSON object, got {type(row).__name__}"
    if column not in row:
        return f"no column {column!r}, {did_you_mean(column, row)} (source key text_column)"
    return f"column {column!r} holds {type(row[column]).__name__}, expected a string"
