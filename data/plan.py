"""What is prepared: the config of `prepare`, and which documents are kept and in which split.

The plan follows from the digests and sizes of the documents, in document order, and from the config alone.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr, model_validator

from data.keyed import philox_key
from data.pipeline import DROPPED, SPLITS, load_arrays, numbered, save_arrays
from data.shards import chunk_documents
from data.sources import SOURCES
from data.tokenizer import TOKENIZERS
from durable import write_file
from schema import ConfigError, Count, Schema, load_node, validate

CONFIG_FILE = "prepare.json"


class StreamConfig(Schema):
    """One stream: a source and what is kept of it."""

    source: Annotated[Any, *SOURCES.slot()]
    max_bytes: Count | None = None
    """Keep about this much text: documents drawn evenly from the whole source, after dropping duplicates."""
    validation_fraction: float | None = Field(None, ge=0, lt=1)
    """For this stream only."""


class PrepareConfig(Schema):
    """What `prepare` makes."""

    output: str
    """Folder of the dataset."""
    seed: int = 17
    tokenizer: Annotated[Any, *TOKENIZERS.slot()]
    validation_fraction: float = Field(0.01, ge=0, lt=1)
    """Share of the documents held out, chosen by a hash of their text. 0: no validation split."""
    deduplicate: Literal["dataset", "stream", "none"] = "dataset"
    """Drop exact copies of an earlier document: of any stream (in the order given), of its own stream, or not."""
    shard_bytes: Annotated[Count, Field(ge=1024, lt=2**32)] = 64_000_000
    """Size at which a shard is closed."""
    streams: dict[str, StreamConfig] = Field(min_length=1)

    _file: str = PrivateAttr("prepare")

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


def plan_documents(config: PrepareConfig, work: Path, tasks: list[dict[str, Any]]) -> list[dict[str, NDArray[Any]]]:
    """The split of every document, or DROPPED, per task; with numbers for the manifest. Raises ConfigError."""
    scans = [load_arrays(numbered(work / "scan", rank, ".npz")) for rank in range(len(tasks))]
    plans: list[dict[str, NDArray[Any]]] = [{}] * len(tasks)
    kept_before = np.zeros((0, 2), np.uint64)
    (work / "plan").mkdir(exist_ok=True)
    for name, stream in config.streams.items():
        ranks = [rank for rank, task in enumerate(tasks) if task["stream"] == name]
        digests = np.concatenate([scans[rank]["digests"] for rank in ranks] or [kept_before[:0]])
        sizes = np.concatenate([scans[rank]["sizes"] for rank in ranks] or [np.zeros(0, np.int64)])
        duplicate = np.zeros(len(sizes), bool)
        if config.deduplicate != "none":
            duplicate = ~_first_seen(digests, kept_before) & (sizes > 0)
        splits = (_keyed_unit(digests, config.seed, "validation") < config.validation_share(name)).astype(np.uint8)
        kept = ~duplicate
        if stream.max_bytes is not None:
            kept[kept] = _draw(_keyed_unit(digests[kept], config.seed, "max_bytes"), sizes[kept], stream.max_bytes)
        _check_split(config, name, splits[kept & (sizes > 0)])
        if config.deduplicate == "dataset":
            kept_before = np.concatenate([kept_before, digests[kept]])
        first = 0
        for rank in ranks:
            part = slice(first, first + len(scans[rank]["sizes"]))
            first = part.stop
            plans[rank] = {
                "splits": np.where(kept[part], splits[part], DROPPED).astype(np.uint8),
                "duplicates": np.bincount(splits[part][duplicate[part]], minlength=len(SPLITS)),
                "stream": np.array(name),
                "kept_bytes": sizes[part][kept[part]].sum(),
                "kept_documents": np.bincount(splits[part][kept[part]], minlength=len(SPLITS)),
            }
            save_arrays(numbered(work / "plan", rank, ".npz"), **plans[rank])
        documents = np.sum([plans[rank]["kept_documents"] for rank in ranks], axis=0)
        sizes_of_chunks = {split: chunk_documents(int(count)) for split, count in zip(SPLITS, documents, strict=True)}
        write_file(work / "plan" / f"{name}.json", json.dumps(sizes_of_chunks).encode())
    return plans


def _check_split(config: PrepareConfig, name: str, splits: NDArray[np.uint8]) -> None:
    share = config.validation_share(name)
    counts = np.bincount(splits, minlength=len(SPLITS))
    if len(splits) == 0:
        raise ConfigError(f"{config._file}: streams.{name}: holds no document (all empty, duplicates or left out)")
    if counts[0] == 0:
        raise ConfigError(
            f"{config._file}: streams.{name}: all of its {len(splits)} documents fall into validation: "
            "lower validation_fraction"
        )
    if share > 0 and counts[1] == 0:
        raise ConfigError(
            f"{config._file}: streams.{name}: none of its {len(splits)} documents falls into validation: raise "
            f"validation_fraction (now {share}), or set it to 0 for no validation split"
        )


def _first_seen(digests: NDArray[np.uint64], before: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which digests (documents, 2) are neither in `before` nor earlier in `digests`. Takes about 100 bytes each."""
    both = np.concatenate([before, digests])
    order = np.lexsort((both[:, 1], both[:, 0]))  # stable: equal ones stay in document order
    ordered = both[order]
    first = np.ones(len(both), bool)
    first[order[1:]] = (ordered[1:] != ordered[:-1]).any(1)
    return first[len(before) :]


def _keyed_unit(digests: NDArray[np.uint64], seed: int, purpose: str) -> NDArray[np.float64]:
    """A number in [0, 1) per document: a function of its text, the seed and the purpose alone.

    The digest, keyed, through the finalizer of MurmurHash3 (public domain), whose output bits all depend on all inputs.
    """
    value = digests[:, 1] ^ philox_key(seed, purpose)[0]
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = (value ^ (value >> np.uint64(33))) * np.uint64(multiplier)
    return ((value ^ (value >> np.uint64(33))) >> np.uint64(11)) * 2.0**-53


def _draw(priority: NDArray[np.float64], sizes: NDArray[np.int64], max_bytes: int) -> NDArray[np.bool_]:
    """Which documents to keep: those of lowest priority number that together stay within max_bytes."""
    order = np.argsort(priority, kind="stable")
    kept = np.zeros(len(sizes), bool)
    kept[order] = np.cumsum(sizes[order]) <= max_bytes
    return kept
