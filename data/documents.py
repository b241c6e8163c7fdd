"""Reading the documents of a task, in the parallel pipelines of `prepare`, and the files they leave for the plan.

A task is a run of units of one stream, listed in WORK/tasks/NNNNN.json. Scanning leaves, in WORK/scan:

    NNNNN.npz          digests (documents, 2) uint64, sizes (documents,) int64 in UTF-8 bytes,
                       filtered (documents,) uint8: 0, or n + 1 for rejected by the n-th filter
    NNNNN.sorted.npy   digests of the documents that are neither empty nor filtered, (2, those) uint64, ascending
    NNNNN.order.npy    their positions in the task, (those,) uint32; equal digests in document order
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from numpy.typing import NDArray

from data.filters import DocumentFilter
from data.sources import SOURCES, Unit
from schema import RunError

SPLITS = ("train", "validation")
DROPPED = 255
"""In a plan: the document is in no split. Else the value is an index into SPLITS."""


def numbered(folder: Path, rank: int, suffix: str) -> Path:
    """The file of one task in one of the working folders."""
    return folder / f"{rank:05d}{suffix}"


def digest(content: bytes) -> bytes:
    """128-bit content hash of a document. Two documents with the same are taken to be the same."""
    return xxhash.xxh3_128_digest(content)


def encode(text: str) -> bytes:
    """A document in UTF-8; lone surrogates, which some sources let through, are no error."""
    return text.encode("utf-8", "surrogatepass")


def digests_to_numbers(digests: bytes) -> NDArray[np.uint64]:
    """Concatenated digests as (documents, 2) uint64."""
    return np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 2)


def save_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """An .npz file, whole or not there."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    np.savez(partial, allow_pickle=False, **arrays)
    partial.rename(path)


def save_array(path: Path, array: NDArray[Any]) -> None:
    """An .npy file, whole or not there."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}.npy")
    np.save(partial, array, allow_pickle=False)
    partial.rename(path)


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """What save_arrays wrote."""
    with np.load(path) as file:
        return dict(file)


class Meter:
    """A task's line in WORK/progress.npy, (tasks, 2) int64: bytes done, and the process at work (0: none).

    Only a local run has that file: without it nothing is recorded.
    """

    def __init__(self, work: Path, rank: int) -> None:
        file = work / "progress.npy"
        self._line = np.load(file, mmap_mode="r+")[rank] if file.exists() else np.zeros(2, np.int64)

    def set(self, done_bytes: int) -> None:
        self._line[0] = done_bytes


class ReadUnits(PipelineStep):
    """The documents of a task's units, in order."""

    type, name = "READER", "units of a source"

    def __init__(self, work: Path, first: int = 0, columns: bool = False, meter: bool = True) -> None:
        """
        Args:
            first: task that rank 0 of this pipeline reads.
            columns: give each document the columns that the task's filters want, as metadata.
            meter: count the units' bytes as progress; else a later step does.
        """
        super().__init__()
        self.work, self.first, self.columns, self.meter = work, first, columns, meter

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        task = json.loads(numbered(self.work / "tasks", self.first + rank, ".json").read_text(encoding="utf-8"))
        source = SOURCES.build(SOURCES.parse(task["source"]))
        columns = task["columns"] if self.columns else []
        meter = Meter(self.work, rank) if self.meter else None
        done = 0
        for number, unit in enumerate(Unit(*fields) for fields in task["units"]):
            rows = source.read_columns(unit, columns) if columns else ((text, {}) for text in source.read(unit))
            for index, (text, values) in enumerate(rows):
                metadata = {"place": unit.path, "columns": values}
                yield Document(text=text, id=f"{number}/{index}", metadata=metadata)
            done += unit.bytes
            if meter is not None:
                meter.set(done)


class Scan(PipelineStep):
    """Filter, digest and measure every document."""

    type, name = "STATS", "scan"

    def __init__(self, work: Path, filters: Mapping[str, Sequence[DocumentFilter | None]]) -> None:
        """filters: of each stream, in the order of the config; None where a filter of whole streams stands."""
        super().__init__()
        self.work, self.filters = work, filters

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        task = json.loads(numbered(self.work / "tasks", rank, ".json").read_text(encoding="utf-8"))
        filters = [(number, each) for number, each in enumerate(self.filters[task["stream"]], 1) if each is not None]
        digests, sizes, filtered = bytearray(), [], bytearray()
        for document in data:
            content = encode(document.text)
            digests += digest(content)
            sizes.append(len(content))
            filtered.append(_rejecting(filters, document, len(sizes)))
        numbers = digests_to_numbers(bytes(digests))
        arrays = {"sizes": np.array(sizes, np.int64), "filtered": np.frombuffer(bytes(filtered), np.uint8)}
        there = np.flatnonzero((arrays["filtered"] == 0) & (arrays["sizes"] > 0))
        there = there[np.lexsort((numbers[there, 1], numbers[there, 0]))]  # stable: equal ones stay in order
        save_array(numbered(self.work / "scan", rank, ".sorted.npy"), np.ascontiguousarray(numbers[there].T))
        save_array(numbered(self.work / "scan", rank, ".order.npy"), there.astype(np.uint32))
        save_arrays(numbered(self.work / "scan", rank, ".npz"), digests=numbers, **arrays)
        yield from ()


def _rejecting(filters: Sequence[tuple[int, DocumentFilter]], document: Document, position: int) -> int:
    """Number of the first filter that rejects the document, or 0."""
    for number, each in filters:
        try:
            if not each.keeps(document.text, document.metadata["columns"]):
                return number
        except ValueError as error:
            place = f"{document.metadata['place']}: document {position} of its part"
            raise RunError(f"{place}: filter {each.config.name!r}: {error}") from None
    return 0


class Select(PipelineStep):
    """The documents that a plan keeps, with their split in metadata. Raises RunError when the source has changed."""

    type, name = "FILTER", "plan"

    def __init__(self, work: Path, folder: str = "plan", first: int = 0) -> None:
        """folder: of WORK; its NNNNN.npz hold `splits`. first: task that rank 0 of this pipeline reads."""
        super().__init__()
        self.work, self.folder, self.first = work, folder, first

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with np.load(numbered(self.work / "scan", self.first + rank, ".npz")) as scan:
            expected = scan["digests"].astype(">u8").tobytes()
        with np.load(numbered(self.work / self.folder, self.first + rank, ".npz")) as plan:
            splits = plan["splits"].tolist()
        count = 0
        for document in data:
            content = encode(document.text)
            if digest(content) != expected[16 * count : 16 * count + 16]:
                raise self._changed(document.metadata["place"])
            if splits[count] != DROPPED:
                document.metadata |= {"split": splits[count], "bytes": len(content)}
                yield document
            count += 1
        if count != len(splits):
            raise self._changed("a source")

    def _changed(self, place: str) -> RunError:
        return RunError(f"{place}: changed while it was being prepared: delete {self.work.parent} and prepare again")
