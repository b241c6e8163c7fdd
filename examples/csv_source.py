"""Slot `source`: one column of CSV files; every row is a document."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from data.sources.base import SOURCES, Unit
from schema import Component, ConfigError, RunError


@SOURCES.register("csv")
class Csv:
    """UTF-8 files with a line of column names on top."""

    class Config(Component):
        name: Literal["csv"] = "csv"
        folder: str = Field(min_length=1, description="all *.csv in it, in the order of their names")
        text_column: str = Field("text", description="the column that holds the document")

    def __init__(self, config: Config) -> None:
        self.config = config

    def units(self) -> list[Unit]:
        """The grain of parallel work and of resuming: here a file. The order must not depend on the machine."""
        files = sorted(Path(self.config.folder).glob("*.csv"))
        if not files:
            raise ConfigError(f"folder: no *.csv in {self.config.folder!r}")
        return [Unit(str(file), 0, size, size) for file in files for size in [file.stat().st_size]]

    def read(self, unit: Unit) -> Iterator[str]:
        """The documents of a file, in order. What cannot be read is a RunError of one line that says where."""
        column = self.config.text_column
        try:
            text = Path(unit.path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{unit.path}: cannot be read: {error}") from None
        for row in (rows := csv.DictReader(io.StringIO(text, newline=""))):
            if row.get(column) is None:
                raise RunError(f"{unit.path}:{rows.line_num}: no column {column!r} (source key text_column)")
            yield row[column]
