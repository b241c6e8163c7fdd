"""What is prepared: the config of `prepare`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from data.preparation.documents import SPLITS
from data.preparation.executors import EXECUTORS
from data.preparation.filters import FILTERS
from data.preparation.sources import SOURCES
from data.tokenizer import TOKENIZERS
from flexbert_core.composing import load_node
from flexbert_core.schema import Count, Schema, UserPath, validate

CONFIG_FILE = "prepare.json"


class StreamConfig(Schema):
    """One stream: a source and what is kept of it."""

    source: Annotated[Any, *SOURCES.slot()]
    """Where its documents come from."""
    on_error: Literal["fail", "skip"] = "fail"
    """What becomes of what cannot be read for what it holds: rows that are no JSON or have no text, text that is not
    UTF-8, files that are damaged or packed in a way that is not known. fail: the first one ends prepare. skip: all are
    left out, and counted by kind in stream.json. What the storage refuses (a locked folder) always ends it."""
    filters: list[Annotated[Any, *FILTERS.slot()]] = Field([], max_length=252)
    """Which documents are kept; those that compare documents with one another (minhash) see what all others kept."""
    max_bytes: Count | None = None
    """Keep about this much text: documents drawn evenly from the whole source, after filters and duplicates."""
    validation_fraction: float | None = Field(None, ge=0, lt=1)
    """For this stream only."""


class PrepareConfig(Schema):
    """What `prepare` makes."""

    output: UserPath
    """Folder of the dataset."""
    seed: int = 17
    """Key of every draw: what is held out, what max_bytes keeps, what the tokenizer is trained on."""
    tokenizer: Annotated[Any, *TOKENIZERS.slot()]
    """What turns text into token ids: trained here, or taken from elsewhere."""
    validation_fraction: float = Field(0.01, ge=0, lt=1)
    """Share of the documents held out, chosen by a hash of their text. 0: no validation split."""
    deduplicate: Literal["dataset", "stream", "none"] = "dataset"
    """Drop exact copies of an earlier document: of any stream (in the order given), of its own stream, or not."""
    shard_bytes: Annotated[Count, Field(ge=1024, lt=2**32)] = 64_000_000
    """Size at which a shard is closed."""
    executor: Annotated[Any, *EXECUTORS.slot()] = "local"
    """Where the work is done. No part of the result: a run can be finished by another executor."""
    streams: dict[str, StreamConfig] = Field(min_length=1)
    """The streams by name; each becomes a folder of that name."""

    _file: str = PrivateAttr("prepare")

    @field_validator("output")
    @classmethod
    def _check_output(cls, output: str) -> str:
        if "://" in output:
            raise ValueError(f"prepare writes to a local folder, got {output!r}: upload it from there")
        return output

    @model_validator(mode="after")
    def _check_streams(self) -> "PrepareConfig":
        seen: dict[str, str] = {}
        for name, stream in self.streams.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name in ("tokenizer", CONFIG_FILE):
                raise ValueError(f"streams.{name}: a stream's name is a folder name of letters, digits, '-', '_', '.'")
            if name.lower() in seen:
                raise ValueError(
                    f"streams.{name}: {seen[name.lower()]!r} is the same name on some file systems: rename one"
                )
            seen[name.lower()] = name
            if stream.validation_fraction is not None and self.deduplicate != "dataset":
                raise ValueError(
                    f"streams.{name}.validation_fraction: needs deduplicate: dataset; else one text could be in the "
                    "training split of one stream and the validation split of another"
                )
        return self

    def splits(self, stream: str) -> list[str]:
        """Names of the splits that a stream has."""
        return list(SPLITS if self.validation_share(stream) > 0 else SPLITS[:1])

    def validation_share(self, stream: str) -> float:
        """The validation fraction of one stream."""
        own = self.streams[stream].validation_fraction
        return self.validation_fraction if own is None else own


def load_prepare_config(path: str | Path, overrides: Sequence[str] = ()) -> PrepareConfig:
    """Read and check a YAML file. Raises ConfigError, one line per fault: `FILE: dotted.key: what is wrong`."""
    config = validate(PrepareConfig, load_node(path, overrides), path)
    config._file = str(path)
    return config
