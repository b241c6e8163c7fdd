"""Parquet files."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

from pydantic import Field

from data.preparation.sources import arrow
from data.preparation.sources.base import SOURCES, DamagedError, Listing, Unit, readable, texts
from data.preparation.sources.files import Fault, File, find_files, open_raw
from data.preparation.sources.text import shown
from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import Component, ConfigError, RunError, UserPath


@SOURCES.register("parquet")
class Parquet:
    """A column of strings or UTF-8 bytes; a unit is a row group. A null is an empty document."""

    class Config(Component):
        name: Literal["parquet"] = "parquet"
        paths: list[UserPath] = Field(
            min_length=1, description="files, folders (all *.parquet below) or globs, also URLs"
        )
        text_column: str = "text"
        """The column that holds the document."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def find(self) -> Listing:
        """Among the faults: a file that has no such column, or one that holds no text."""
        found = find_files(self.config.paths, [".parquet"], compressed=())
        units, faults, left_out = [], list(found.faults), found.left_out
        for file in found.files:
            try:
                groups = self._units(file)
                left_out["no rows"] += not groups
                units += groups
            except DamagedError as error:
                faults.append(Fault(error.reason, partial(DamagedError, str(error))))
            except ConfigError as error:
                faults.append(Fault("no text column", partial(ConfigError, str(error))))
        return Listing(units, found.files, +left_out, faults)

    def check_columns(self, unit: Unit, names: Sequence[str]) -> None:
        import pyarrow.parquet as pq

        with readable(unit.path), open_raw(unit.path) as raw, pq.ParquetFile(raw) as file:
            found = file.schema_arrow.names
        for name in names:
            if name not in found:
                raise ConfigError(f"no column {name!r} in {shown(unit.path)}, {did_you_mean(name, found)}")

    def read(self, unit: Unit) -> Iterator[str | Fault]:
        return texts(self.read_columns(unit, ()))

    def read_columns(self, unit: Unit, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]] | Fault]:
        import pyarrow.parquet as pq

        column, first = self.config.text_column, 0
        wanted = list(dict.fromkeys([column, *names]))

        def error(index: int, message: str) -> RunError:
            return RunError(f"{shown(unit.path)}: row group {unit.start}, row {first + index}: {shown(message)}")

        with (
            readable(unit.path, f"row group {unit.start}: "),
            open_raw(unit.path) as raw,
            pq.ParquetFile(raw) as file,
        ):
            for name in wanted:
                if name not in file.schema_arrow.names:
                    hint = did_you_mean(name, file.schema_arrow.names)
                    raise DamagedError(f"{shown(unit.path)}: no column {name!r}, {hint}", f"no column {name!r}")
            for batch in file.iter_batches(1024, range(unit.start, unit.stop), wanted):
                columns = {name: batch.column(name) for name in wanted}
                yield from arrow.rows(columns, column, names, error)
                first += batch.num_rows

    def _units(self, file: File) -> list[Unit]:
        import pyarrow.parquet as pq

        with readable(file.path), open_raw(file.path) as raw, pq.ParquetFile(raw) as opened:
            schema, metadata = opened.schema_arrow, opened.metadata
        column = self.config.text_column
        if column not in schema.names:
            hint = did_you_mean(column, schema.names)
            raise ConfigError(f"text_column: {shown(file.path)} has no column {column!r}, {hint}")
        if schema.names.count(column) > 1:
            raise ConfigError(f"text_column: {shown(file.path)} has {schema.names.count(column)} columns {column!r}")
        kind = schema.field(column).type
        if not arrow.holds_text(kind):
            raise ConfigError(f"text_column: {shown(file.path)}: column {column!r} holds {kind}, expected strings")
        sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
        return [Unit(file.path, group, group + 1, size) for group, size in enumerate(sizes)]
