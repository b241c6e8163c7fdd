"""Which documents are kept, and in which split: stream by stream, in the order of the config.

    filtered (by the scan) -> exact copies -> filters of whole streams -> max_bytes -> split

The plan follows from the digests, sizes and columns of the documents, in document order, and from the config alone.
Each task's part of it is WORK/plan/NNNNN.npz; WORK/plan/STREAM.json is written last: a stream that has it is not
planned again.
"""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.keyed import philox_key
from data.preparation.config import PrepareConfig
from data.preparation.documents import (
    DROPPED,
    SPLITS,
    ReadUnits,
    Select,
    load_arrays,
    load_scan,
    numbered,
    save_arrays,
)
from data.preparation.duplicates import find_copies, keep_digests
from data.preparation.filters import FILTERS, DocumentFilter
from data.preparation.filters.base import Run
from data.store.manifest import chunk_documents
from flexbert_core.durable import write_file
from flexbert_core.schema import ConfigError

# Why a document is left out; 1 to 252: the number of the filter in the config, from 1; ODD.
_KEPT, _OVER_BUDGET, _COPY = 0, 254, 255
BINS = 2**16


class TaskPlan(NamedTuple):
    """What the plan says about one task; what is left out is counted by the split it would be in."""

    stream: str
    kept_bytes: int
    duplicates: list[int]
    """By split."""
    filtered: dict[str, list[int]]
    """By filter and split."""
    over_max_bytes: list[int]
    """By split."""


def choose_documents(config: PrepareConfig, work: Path, tasks: list[dict[str, Any]], run: Run) -> list[TaskPlan]:
    """Plan all streams; one TaskPlan per task. Raises ConfigError when a stream or split ends up empty."""
    (work / "plan").mkdir(exist_ok=True)
    earlier: list[int] = []
    plans = []
    for name in config.streams:
        ranks = [rank for rank, task in enumerate(tasks) if task["stream"] == name]
        if not (work / "plan" / f"{name}.json").exists():
            _Choice(config, work, name, ranks, [sum(unit[3] for unit in tasks[rank]["units"]) for rank in ranks]).make(
                earlier if config.deduplicate == "dataset" else [], run
            )
        earlier += ranks
        plans += [_load_plan(config, work, name, rank) for rank in ranks]
    return plans


def filter_labels(config: PrepareConfig, stream: str) -> list[str]:
    """A name for each filter of a stream, for its counts: its own, with a number when it is not the first of them."""
    names = [each.name for each in config.streams[stream].filters]
    counts = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return [name if count == 1 else f"{name}-{count}" for name, count in zip(names, counts, strict=True)]


def _load_plan(config: PrepareConfig, work: Path, name: str, rank: int) -> TaskPlan:
    plan = load_arrays(numbered(work / "plan", rank, ".npz"), work / "plan" / f"{name}.json")
    labels = filter_labels(config, name)
    counts = {label: counts.tolist() for label, counts in zip(labels, plan["filtered"], strict=True)}
    return TaskPlan(name, int(plan["kept_bytes"]), plan["duplicates"].tolist(), counts, plan["over_max_bytes"].tolist())


class _Choice:
    """The plan of one stream. Holds 1 byte for each of its documents."""

    def __init__(self, config: PrepareConfig, work: Path, name: str, ranks: list[int], task_bytes: list[int]) -> None:
        self.config, self.work, self.name, self.ranks, self.task_bytes = config, work, name, ranks, task_bytes
        filtered = [self._scan(rank, "filtered") for rank in ranks]
        edges = np.cumsum([0, *map(len, filtered)]).tolist()
        self.starts, self.parts = edges[:-1], [slice(a, b) for a, b in pairwise(edges)]
        self.reasons: NDArray[np.uint8] = np.concatenate([np.zeros(0, np.uint8), *filtered])

    def make(self, earlier: Sequence[int], run: Run) -> None:
        if self.config.deduplicate != "none":
            for copies in find_copies(self.work, self.ranks, self.starts, earlier):
                self.reasons[copies] = _COPY
        for number, each in enumerate(self.config.streams[self.name].filters, 1):
            if not issubclass(FILTERS.entries[each.name], DocumentFilter):
                self._compare(number, each, run)
        max_bytes = self.config.streams[self.name].max_bytes
        if max_bytes is not None:
            self._draw(max_bytes)
        self._write()

    def _scan(self, rank: int, array: str) -> NDArray[Any]:
        return load_scan(self.work, rank, array)[array]

    def _compare(self, number: int, each: Any, run: Run) -> None:
        """Apply a filter of whole streams to what is left."""
        title = f"{self.name}-{number}"
        folder, kept = self.work / "filters" / title, f"filters/{title}/kept"
        (self.work / kept).mkdir(parents=True, exist_ok=True)
        counts = [int((self.reasons[part] == _KEPT).sum()) for part in self.parts]
        for rank, part in zip(self.ranks, self.parts, strict=True):
            splits = np.where(self.reasons[part] == _KEPT, 0, DROPPED).astype(np.uint8)
            save_arrays(numbered(self.work / kept, rank, ".npz"), splits=splits)
        documents = [ReadUnits(self.work, self.ranks[0]), Select(self.work, kept, self.ranks[0])]

        def run_here(name: str, steps: Sequence[Any], sizes: Sequence[int]) -> None:
            run(f"{title}-{name}", steps, sizes)

        dropped = FILTERS.build(each).drop(documents, counts, self.task_bytes, folder, run_here)
        # The positions of one task at a time: those of all would be 8 bytes for each document.
        for part, positions in zip(self.parts, dropped, strict=True):
            self.reasons[part.start + np.flatnonzero(self.reasons[part] == _KEPT)[positions]] = number

    def _draw(self, max_bytes: int) -> None:
        """Leave out all but the documents of lowest priority that together stay within max_bytes.

        Exact with little memory: bytes by bins of priority first, then in order inside the bin where they reach it.
        """
        by_bin = np.zeros(BINS)
        for rank, part in zip(self.ranks, self.parts, strict=True):
            kept = self.reasons[part] == _KEPT
            priority = _keyed_unit(self._scan(rank, "digests")[kept], self.config.seed, "max_bytes")
            by_bin += np.bincount((priority * BINS).astype(np.int64), self._scan(rank, "sizes")[kept], BINS)
        full = int(np.searchsorted(np.cumsum(by_bin), max_bytes, side="right"))  # bins below this are kept whole
        priorities, sizes, positions = [np.zeros(0)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for rank, part in zip(self.ranks, self.parts, strict=True):
            kept = np.flatnonzero(self.reasons[part] == _KEPT)
            priority = _keyed_unit(self._scan(rank, "digests")[kept], self.config.seed, "max_bytes")
            bins = (priority * BINS).astype(np.int64)
            self.reasons[part.start + kept[bins > full]] = _OVER_BUDGET
            inside = bins == full
            priorities.append(priority[inside])
            sizes.append(self._scan(rank, "sizes")[kept[inside]])
            positions.append(part.start + kept[inside])
        order = np.argsort(np.concatenate(priorities), kind="stable")
        together = int(by_bin[:full].sum()) + np.cumsum(np.concatenate(sizes)[order])
        self.reasons[np.concatenate(positions)[order[together > max_bytes]]] = _OVER_BUDGET

    def _write(self) -> None:
        share, filters = self.config.validation_share(self.name), len(self.config.streams[self.name].filters)
        last = self.name == list(self.config.streams)[-1]
        documents, full = np.zeros(len(SPLITS), np.int64), np.zeros(len(SPLITS), np.int64)
        for rank, part in zip(self.ranks, self.parts, strict=True):
            reasons, sizes = self.reasons[part], self._scan(rank, "sizes")
            validation = _keyed_unit(self._scan(rank, "digests"), self.config.seed, "validation") < share
            splits, kept = validation.astype(np.uint8), reasons == _KEPT
            documents += np.bincount(splits[kept], minlength=len(SPLITS))
            full += np.bincount(splits[kept & (sizes > 0)], minlength=len(SPLITS))
            if self.config.deduplicate == "dataset" and not last:
                keep_digests(self.work, rank, kept)
            save_arrays(
                numbered(self.work / "plan", rank, ".npz"),
                splits=np.where(kept, splits, DROPPED).astype(np.uint8),
                duplicates=np.bincount(splits[reasons == _COPY], minlength=len(SPLITS)),
                filtered=np.array(
                    [np.bincount(splits[reasons == each], minlength=len(SPLITS)) for each in range(1, filters + 1)]
                ).reshape(filters, len(SPLITS)),
                over_max_bytes=np.bincount(splits[reasons == _OVER_BUDGET], minlength=len(SPLITS)),
                kept_bytes=sizes[kept].sum(),
            )
        if not full.any():
            raise ConfigError(f"{self.config._file}: streams.{self.name}: holds no document: {self._left_out()}")
        _check_splits(self.config, self.name, full.tolist())
        sizes_of_chunks = {split: chunk_documents(int(count)) for split, count in zip(SPLITS, documents, strict=True)}
        write_file(self.work / "plan" / f"{self.name}.json", json.dumps(sizes_of_chunks).encode())

    def _left_out(self) -> str:
        """Why a stream is empty: counts by reason."""
        counts = Counter[str]()
        for rank in self.ranks:
            skipped = json.loads(numbered(self.work / "scan", rank, ".skipped.json").read_text("utf-8"))
            counts.update({f"skipped ({reason})": count for reason, (count, _) in skipped.items()})
        labels = filter_labels(self.config, self.name)
        for number, why in [*enumerate(labels, 1), (_COPY, "duplicates"), (_OVER_BUDGET, "over max_bytes")]:
            counts[why] += int((self.reasons == number).sum())
        counts["empty"] += int((self.reasons == _KEPT).sum())  # those that are not would be in the stream
        said = ", ".join(f"{count:,} {why}" for why, count in counts.items() if count)
        return said or "its source gives none"


def _check_splits(config: PrepareConfig, name: str, counts: list[int]) -> None:
    """counts: documents of each split that are not empty; some are not."""
    share, total = config.validation_share(name), sum(counts)
    if counts[0] == 0:
        raise ConfigError(
            f"{config._file}: streams.{name}: all of its {total} documents fall into validation: "
            "lower validation_fraction"
        )
    if share > 0 and counts[1] == 0:
        raise ConfigError(
            f"{config._file}: streams.{name}: none of its {total} documents falls into validation: raise "
            f"validation_fraction (now {share}), or set it to 0 for no validation split"
        )


def _keyed_unit(digests: NDArray[np.uint64], seed: int, purpose: str) -> NDArray[np.float64]:
    """A number in [0, 1) per document: a function of its text, the seed and the purpose alone.

    The digest, keyed, through the finalizer of MurmurHash3 (public domain), whose output bits all depend on all inputs.
    """
    value = digests[:, 1] ^ philox_key(seed, purpose)[0]
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = (value ^ (value >> np.uint64(33))) * np.uint64(multiplier)
    return ((value ^ (value >> np.uint64(33))) >> np.uint64(11)) * 2.0**-53
