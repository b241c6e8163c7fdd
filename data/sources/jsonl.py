"""JSON lines."""

from collections.abc import Iterator
from typing import Literal

import orjson
from pydantic import Field

from data.sources.base import COMPRESSED_SUFFIXES, SOURCES, Unit, find_files, line_number, line_units, read_lines
from schema import Component, RunError, did_you_mean


@SOURCES.register("jsonl")
class Jsonl:
    """One JSON object a line, plain or .gz, .xz, .zst; the document is one of its columns."""

    class Config(Component):
        name: Literal["jsonl"] = "jsonl"
        paths: list[str] = Field(min_length=1, description="files, folders (all *.jsonl below) or globs")
        text_column: str = "text"

    def __init__(self, config: Config) -> None:
        self.config = config

    def units(self) -> list[Unit]:
        files = find_files(self.config.paths, [".jsonl", *(".jsonl" + suffix for suffix in COMPRESSED_SUFFIXES)])
        return [unit for file in files for unit in line_units(file)]

    def read(self, unit: Unit) -> Iterator[str]:
        column = self.config.text_column
        for index, line in enumerate(read_lines(unit)):
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            if not line:
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise RunError(f"{unit.path}:{line_number(unit, index)}: not valid JSON: {error}") from None
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                raise RunError(f"{unit.path}:{line_number(unit, index)}: {_fault(row, column)}")
            yield row[column]


def _fault(row: object, column: str) -> str:
    if not isinstance(row, dict):
        return f"expected a JSON object, got {type(row).__name__}"
    if column not in row:
        return f"no column {column!r}, {did_you_mean(column, row)} (source key text_column)"
    return f"column {column!r} holds {type(row[column]).__name__}, expected a string"
