"""Parquet files."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from data.sources.base import SOURCES, Unit, find_files
from schema import Component, ConfigError, RunError, did_you_mean


@SOURCES.register("parquet")
class Parquet:
    """A column of strings; a unit is a row group. A null is an empty document."""

    class Config(Component):
        name: Literal["parquet"] = "parquet"
        paths: list[str] = Field(min_length=1, description="files, folders (all *.parquet below) or globs")
        text_column: str = "text"

    def __init__(self, config: Config) -> None:
        self.config = config

    def units(self) -> list[Unit]:
        """Raises ConfigError when a file has no such column or it does not hold strings."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        units = []
        for path in find_files(self.config.paths, [".parquet"]):
            try:
                file = pq.ParquetFile(path)
            except (pa.ArrowException, OSError) as error:
                raise RunError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
            with file:
                schema = file.schema_arrow
                if self.config.text_column not in schema.names:
                    hint = did_you_mean(self.config.text_column, schema.names)
                    raise ConfigError(f"text_column: {path} has no column {self.config.text_column!r}, {hint}")
                kind = schema.field(self.config.text_column).type
                if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                    raise ConfigError(
                        f"text_column: {path}: column {self.config.text_column!r} holds {kind}, expected strings"
                    )
                for group in range(file.num_row_groups):
                    units.append(Unit(path, group, group + 1, file.metadata.row_group(group).total_byte_size))
        return units

    def read(self, unit: Unit) -> Iterator[str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(unit.path) as file:
                for batch in file.iter_batches(1024, range(unit.start, unit.stop), [self.config.text_column]):
                    for text in batch.column(0).to_pylist():
                        yield text or ""
        except (pa.ArrowException, OSError) as error:
            raise RunError(
                f"{unit.path}: row group {unit.start}: cannot be read: {str(error).splitlines()[0]}"
            ) from None
