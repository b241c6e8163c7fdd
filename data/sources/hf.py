"""Datasets of Hugging Face's `datasets` library."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from data.sources.base import SOURCES, Unit
from schema import Component, ConfigError, RunError, did_you_mean

_ROWS_PER_UNIT = 4096


@SOURCES.register("datasets")
class HuggingFaceDataset:
    """A folder written by `save_to_disk`, or a dataset of the hub (only then is the network used). A null is empty."""

    class Config(Component):
        name: Literal["datasets"] = "datasets"
        path: str | None = None
        """Folder written by save_to_disk. Give this or `hub`."""
        hub: str | None = None
        """Name of a hub dataset, such as `HuggingFaceFW/fineweb-edu`."""
        config: str | None = None
        """Configuration of the hub dataset, where it has several."""
        split: str | None = None
        """Which split, where there are several."""
        text_column: str = "text"
        """The column that holds the document."""

        @model_validator(mode="after")
        def _one_place(self) -> "HuggingFaceDataset.Config":
            if (self.path is None) == (self.hub is None):
                raise ValueError("give either path (a folder written by save_to_disk) or hub (a name on the hub)")
            if self.path is not None and self.config is not None:
                raise ValueError("config goes with hub; a saved folder holds one configuration")
            if self.hub is not None and self.split is None:
                raise ValueError("split is required with hub, such as split: train")
            return self

    def __init__(self, config: Config) -> None:
        self.config = config

    def units(self) -> list[Unit]:
        """Raises ConfigError for a missing folder, split or column."""
        column = self.config.text_column
        if column not in self._dataset.column_names:
            raise ConfigError(f"text_column: no column {column!r}, {did_you_mean(column, self._dataset.column_names)}")
        rows = len(self._dataset)
        row_bytes = self._dataset.data.nbytes // max(rows, 1)
        starts = range(0, rows, _ROWS_PER_UNIT)
        stops = [min(start + _ROWS_PER_UNIT, rows) for start in starts]
        return [Unit(self._where, a, b, (b - a) * row_bytes) for a, b in zip(starts, stops, strict=True)]

    def check_columns(self, unit: Unit, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._dataset.column_names:
                raise ConfigError(
                    f"no column {name!r} in {self._where}, {did_you_mean(name, self._dataset.column_names)}"
                )

    def read(self, unit: Unit) -> Iterator[str]:
        return (text for text, _ in self.read_columns(unit, ()))

    def read_columns(self, unit: Unit, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        column = self.config.text_column
        for start in range(unit.start, unit.stop, 256):
            rows = self._dataset[start : min(start + 256, unit.stop)]
            for index, text in enumerate(rows[column]):
                if text is not None and not isinstance(text, str):
                    kind = type(text).__name__
                    raise RunError(
                        f"{unit.path}: row {start + index}: column {column!r} holds {kind}, expected a string"
                    )
                yield text or "", {name: rows[name][index] for name in names}

    @property
    def _where(self) -> str:
        return str(self.config.path or self.config.hub)

    @cached_property
    def _dataset(self) -> Any:
        import datasets

        if self.config.hub is not None:
            try:
                return datasets.load_dataset(self.config.hub, self.config.config, split=self.config.split)
            except Exception as error:  # the hub client has no common root for what can go wrong
                raise RunError(f"hub dataset {self.config.hub!r}: {str(error).splitlines()[0]}") from None
        path = Path(self._where)
        if not (path / "state.json").exists() and not (path / "dataset_dict.json").exists():
            raise ConfigError(f"path: {path} is no folder written by save_to_disk (for a name on the hub use `hub`)")
        dataset = datasets.load_from_disk(str(path))
        if isinstance(dataset, datasets.DatasetDict):
            if self.config.split is None or self.config.split not in dataset:
                hint = did_you_mean(self.config.split or "", map(str, dataset))
                raise ConfigError(f"split: {path} has no split {self.config.split!r}, {hint}")
            return dataset[self.config.split]
        if self.config.split is not None:
            raise ConfigError(f"split: {path} holds one split only: leave the key out")
        return dataset
