"""Datasets of Hugging Face's `datasets` library."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from data.preparation.sources import arrow
from data.preparation.sources.base import SOURCES, Listing, Unit, readable, texts
from data.preparation.sources.files import Fault, File, reason
from data.preparation.sources.local import sample
from data.preparation.sources.text import shown
from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import Component, ConfigError, RunError, UserPath

_ROWS_PER_UNIT, _ROWS_AT_ONCE = 4096, 256
_OPEN_DATASETS = 16  # of the hub, in a process; they are mapped into memory


@SOURCES.register("datasets")
class HuggingFaceDataset:
    """A folder written by `save_to_disk`, or a dataset of the hub (only then is the network used). A null is empty."""

    class Config(Component):
        name: Literal["datasets"] = "datasets"
        path: UserPath | None = None
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

    def find(self) -> Listing:
        """Raises ConfigError for a missing folder, split or column, or a column that holds no text."""
        column, features = self.config.text_column, self._dataset.data.schema
        if column not in self._dataset.column_names:
            raise ConfigError(f"text_column: no column {column!r}, {did_you_mean(column, self._dataset.column_names)}")
        if not arrow.holds_text(features.field(column).type):
            kind = features.field(column).type
            raise ConfigError(f"text_column: {self._where}: column {column!r} holds {kind}, expected strings")
        rows = len(self._dataset)
        row_bytes = self._dataset.data.nbytes // max(rows, 1)
        starts = range(0, rows, _ROWS_PER_UNIT)
        stops = [min(start + _ROWS_PER_UNIT, rows) for start in starts]
        # All processes read the commit that was found here, whatever comes on the hub meanwhile.
        place = f"{self._where}@{self._commit}" if self._commit else self._where
        units = [Unit(place, a, b, (b - a) * row_bytes) for a, b in zip(starts, stops, strict=True)]
        return Listing(units, self._files(), Counter(), [])

    def check_columns(self, unit: Unit, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._dataset.column_names:
                raise ConfigError(
                    f"no column {name!r} in {shown(self._where)}, {did_you_mean(name, self._dataset.column_names)}"
                )

    def read(self, unit: Unit) -> Iterator[str | Fault]:
        return texts(self.read_columns(unit, ()))

    def read_columns(self, unit: Unit, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]] | Fault]:
        column = self.config.text_column
        wanted = list(dict.fromkeys([column, *names]))
        # As Arrow gives them: the other columns (pictures, say) are not decoded.
        dataset = self._of(unit).select_columns(wanted).with_format("arrow")
        for start in range(unit.start, unit.stop, _ROWS_AT_ONCE):
            with readable(unit.path, f"row {start}: "):
                table = dataset[start : min(start + _ROWS_AT_ONCE, unit.stop)]
                yield from arrow.rows(
                    {name: table.column(name) for name in wanted}, column, names, partial(_error, unit.path, start)
                )

    def _files(self) -> list[File]:
        """The files that hold the rows; of a dataset of the hub its own fingerprint."""
        if self.config.hub is not None:
            return [File(self.config.hub, self._dataset.data.nbytes, self._dataset._fingerprint)]
        paths = sorted({file["filename"] for file in self._dataset.cache_files})
        samples = {path: sample(path) for path in paths}
        return [File(path, size, mark) for path, (size, mark, _) in samples.items()]

    @property
    def _where(self) -> str:
        return str(self.config.path or self.config.hub)

    def _of(self, unit: Unit) -> Any:
        """The dataset of which a unit is."""
        if self.config.hub is None:
            return self._dataset
        return _load_from_hub(
            self.config.hub, self.config.config, self.config.split, unit.path.removeprefix(self._where)[1:] or None
        )

    @cached_property
    def _commit(self) -> str | None:
        """The newest one on the hub. None: nobody is to be asked, the folder is here or the hub is not to be used."""
        import huggingface_hub

        name = self.config.hub
        if name is None or huggingface_hub.constants.HF_HUB_OFFLINE or Path(name).is_dir():
            return None
        with _of_hub(name):
            return huggingface_hub.HfApi().dataset_info(name).sha

    @cached_property
    def _dataset(self) -> Any:
        import datasets

        if self.config.hub is not None:
            return _load_from_hub(self.config.hub, self.config.config, self.config.split, self._commit)
        path = Path(self._where)
        if not (path / "state.json").exists() and not (path / "dataset_dict.json").exists():
            raise ConfigError(f"path: {path} is no folder written by save_to_disk (for a name on the hub use `hub`)")
        try:
            dataset = datasets.load_from_disk(str(path))
        except IndexError:  # what save_to_disk writes of a dataset without rows, it cannot load
            raise ConfigError(
                f"path: {shown(str(path))}: lists no data files, so it holds no rows: leave it out"
            ) from None
        except Exception as error:  # files that are missing or damaged: it raises what its parsers raise
            raise RunError(f"{shown(str(path))}: cannot be read: {reason(str(path), error)}") from None
        if isinstance(dataset, datasets.DatasetDict):
            if self.config.split is None or self.config.split not in dataset:
                hint = did_you_mean(self.config.split or "", map(str, dataset))
                raise ConfigError(f"split: {path} has no split {self.config.split!r}, {hint}")
            return dataset[self.config.split]
        if self.config.split is not None:
            raise ConfigError(f"split: {path} holds one split only: leave the key out")
        return dataset


@contextmanager
def _of_hub(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub client has no common root for what can go wrong
        raise RunError(f"hub dataset {name!r}: {(str(error).splitlines() or [type(error).__name__])[0]}") from None


@lru_cache(_OPEN_DATASETS)
def _load_from_hub(name: str, config: str | None, split: str | None, commit: str | None) -> Any:
    """A process asks the hub once, not in each of some thousand tasks: it has rate limits."""
    import datasets

    with _of_hub(name):
        return datasets.load_dataset(name, config, split=split, revision=commit)


def _error(path: str, start: int, index: int, message: str) -> RunError:
    return RunError(f"{shown(path)}: row {start + index}: {shown(message)}")
