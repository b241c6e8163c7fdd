"""Parquet files."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field

from data.sources.base import SOURCES, Unit, readable
from data.sources.files import find_files, open_raw
from schema import Component, ConfigError, RunError, did_you_mean


@SOURCES.register("parquet")
class Parquet:
    """A column of strings; a unit is a row group. A null is an empty document."""

    class Config(Component):
        name: Literal["parquet"] = "parquet"
        paths: list[str] = Field(min_length=1, description="files, folders (all *.parquet below) or globs, also URLs")
        text_column: str = "text"
        """The column that holds the document."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def units(self) -> list[Unit]:
        """Raises ConfigError when a file has no such column or it does not hold strings."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        units = []
        for path, _ in find_files(self.config.paths, [".parquet"]):
            with readable(path), open_raw(path) as raw, pq.ParquetFile(raw) as file:
                schema, metadata = file.schema_arrow, file.metadata
            if self.config.text_column not in schema.names:
                hint = did_you_mean(self.config.text_column, schema.names)
                raise ConfigError(f"text_column: {path} has no column {self.config.text_column!r}, {hint}")
            kind = schema.field(self.config.text_column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ConfigError(
                    f"text_column: {path}: column {self.config.text_column!r} holds {kind}, expected strings"
                )
            for group in range(metadata.num_row_groups):
                units.append(Unit(path, group, group + 1, metadata.row_group(group).total_byte_size))
        return units

    def check_columns(self, unit: Unit, names: Sequence[str]) -> None:
        import pyarrow.parquet as pq

        with readable(unit.path), open_raw(unit.path) as raw, pq.ParquetFile(raw) as file:
            found = file.schema_arrow.names
        for name in names:
            if name not in found:
                raise ConfigError(f"no column {name!r} in {unit.path}, {did_you_mean(name, found)}")

    def read(self, unit: Unit) -> Iterator[str]:
        return (text for text, _ in self.read_columns(unit, ()))

    def read_columns(self, unit: Unit, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        import pyarrow.parquet as pq

        wanted = list(dict.fromkeys([self.config.text_column, *names]))
        with (
            readable(unit.path, f"row group {unit.start}: "),
            open_raw(unit.path) as raw,
            pq.ParquetFile(raw) as file,
        ):
            for name in wanted:
                if name not in file.schema_arrow.names:
                    raise RunError(f"{unit.path}: no column {name!r}, {did_you_mean(name, file.schema_arrow.names)}")
            for batch in file.iter_batches(1024, range(unit.start, unit.stop), wanted):
                columns = [batch.column(name).to_pylist() for name in wanted]
                for text, *values in zip(*columns, strict=True):
                    row = dict(zip(wanted, (text, *values), strict=True))
                    yield text or "", {name: row[name] for name in names}
