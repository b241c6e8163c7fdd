"""Slot `source`: one column of CSV files; every row is a document."""

import csv
import io
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from data.preparation.sources.base import SOURCES, DamagedError, Listing, Unit, file_unit, listing, read_bytes
from data.preparation.sources.files import Fault, find_files
from flexbert_core.schema import Component, RunError, UserPath


@SOURCES.register("csv")
class Csv:
    """UTF-8 files with a line of column names on top."""

    class Config(Component):
        name: Literal["csv"] = "csv"
        paths: list[UserPath] = Field(min_length=1, description="files, folders (all *.csv below) or globs, also URLs")
        text_column: str = Field("text", description="the column that holds the document")

    def __init__(self, config: Config) -> None:
        self.config = config

    def find(self) -> Listing:
        """What there is, as units: the grain of parallel work and of resuming, here a file. find_files sorts by path,
        and says what it left out and why."""
        return listing(find_files(self.config.paths, [".csv"]), lambda file: [file_unit(file)])

    def read(self, unit: Unit) -> Iterator[str | Fault]:
        """The documents of a file, in order. `on_error: skip` leaves out what is a Fault or a DamagedError."""
        column = self.config.text_column
        try:
            text = read_bytes(unit.path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedError(f"{unit.path}: not UTF-8: {error}", "text that is not UTF-8") from None
        for row in (rows := csv.DictReader(io.StringIO(text, newline=""))):
            if isinstance(row.get(column), str):
                yield row[column]
            else:
                message = f"{unit.path}:{rows.line_num}: no column {column!r} (source key text_column)"
                yield Fault("row without text", lambda said=message: RunError(said))
