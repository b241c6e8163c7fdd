"""Reading the documents of a task, in the parallel pipelines of `prepare`, and the files they leave for the plan.

A task is a run of units of one stream, listed in WORK/tasks/NNNNN.json. Scanning leaves, in WORK/scan:

    NNNNN.npz          digests (documents, 2) uint64, sizes (documents,) int64 in UTF-8 bytes,
                       filtered (documents,) uint8: 0, n + 1 for rejected by the n-th filter, or ODD
    NNNNN.skipped.json {reason: [how many, the first of them]}: what on_error: skip, or a rule of the source, leaves out
                       (the first is a message, or what a LineError makes its message of)
    NNNNN.sorted.npy   digests of the documents that are neither empty nor filtered, (2, those) uint64, ascending
    NNNNN.order.npy    their positions in the task, (those,) uint32; equal digests in document order
"""

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from numpy.typing import NDArray

from data.preparation.filters import DocumentFilter
from data.preparation.sources import SOURCES, DamagedError, Fault, LineError, Unit
from data.preparation.sources.text import mend_surrogates, shown
from flexbert_core.durable import sync, write_file
from flexbert_core.schema import RunError

SPLITS = ("train", "validation")
ODD = 253
"""In a scan: a document whose columns a filter cannot make sense of."""
DROPPED = 255
"""In a plan: the document is in no split. Else the value is an index into SPLITS."""


def numbered(folder: Path, rank: int, suffix: str) -> Path:
    """The file of one task in one of the working folders."""
    return folder / f"{rank:05d}{suffix}"


def digest(content: bytes) -> bytes:
    """128-bit content hash of a document. Two documents with the same are taken to be the same."""
    return xxhash.xxh3_128_digest(content)


def digests_to_numbers(digests: bytes) -> NDArray[np.uint64]:
    """Concatenated digests as (documents, 2) uint64."""
    return np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 2)


def save_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """An .npz file, whole and synced or not there."""
    _save(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def save_array(path: Path, array: NDArray[Any]) -> None:
    """An .npy file, whole and synced or not there."""
    _save(path, lambda file: np.save(file, array, allow_pickle=False))


def _save(path: Path, write: Callable[[BinaryIO], None]) -> None:
    # The name holds the process: of two that do one task neither renames what the other is writing.
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync(path.parent)


def mark(work: Path, stage: str, rank: int) -> Path:
    """The file that says that a stage has done a task."""
    return numbered(work / "logs" / stage / "completions", rank, "")


def load_arrays(path: Path, done: Path, *names: str) -> dict[str, NDArray[Any]]:
    """What save_arrays wrote: these arrays, or all.

    Raises RunError when the file cannot be read, and removes `done`, which says that it is there: then it is made anew.
    """
    with _readable(path, done), np.load(path) as file:
        return {name: file[name] for name in names or file.files}


def load_array(path: Path, done: Path | None) -> NDArray[Any]:
    """What save_array wrote, mapped into memory. Raises and removes like `load_arrays`; None: nothing."""
    with _readable(path, done):
        return np.load(path, mmap_mode="r")


@contextmanager
def _readable(path: Path, done: Path | None) -> Iterator[None]:
    try:
        yield
    except (EOFError, ValueError, KeyError, zipfile.BadZipFile, FileNotFoundError):
        fix = "run the same command again, which makes it anew"
        if done is None:
            fix = f"delete {path.parents[2]} and prepare again"
        else:
            done.unlink(missing_ok=True)
        raise RunError(f"{shown(str(path))}: damaged or missing (has the power failed?): {fix}") from None


def load_scan(work: Path, rank: int, *names: str) -> dict[str, NDArray[Any]]:
    """Arrays of a task's scan. Raises RunError when they cannot be read; the next run scans that task anew."""
    return load_arrays(numbered(work / "scan", rank, ".npz"), mark(work, "scan", rank), *names)


class Meter:
    """A task's line in WORK/progress.npy, (tasks, 2) int64: bytes done, and the process at work (0: none).

    Only a local run has that file: without it nothing is recorded.
    """

    def __init__(self, work: Path, rank: int) -> None:
        file = work / "progress.npy"
        self._line = np.load(file, mmap_mode="r+")[rank] if file.exists() else np.zeros(2, np.int64)

    def set(self, done_bytes: int) -> None:
        self._line[0] = done_bytes


class TaskDocuments:
    """The documents of a task's units, in order: text, place and columns of each.

    The columns are those that the stream's filters want. They are read in every pass, for on_error: skip leaves out a
    row that lacks one: passes without them would see it.

    skipped: as in NNNNN.skipped.json, of what was none, as far as has been read.
    """

    def __init__(self, task: Mapping[str, Any], meter: Meter | None = None) -> None:
        self.task, self.meter = task, meter
        self.columns: list[str] = task["columns"]
        self.source = SOURCES.build(SOURCES.parse(task["source"]))
        self.skipped: dict[str, list[Any]] = {}

    def __iter__(self) -> Iterator[Document]:
        """Raises RunError for the first fault, unless the stream's on_error is `skip`."""
        done = 0
        for number, unit in enumerate(Unit(*fields) for fields in self.task["units"]):
            try:
                for index, row in enumerate(self._rows(unit)):
                    if isinstance(row, Fault):
                        self.skip(row)
                        continue
                    text, values = row
                    metadata = {"place": unit.path, "columns": values}
                    yield Document(text=mend_surrogates(text), id=f"{number}/{index}", metadata=metadata)
            except DamagedError as error:
                self.skip(Fault(error.reason, partial(DamagedError, str(error))))
            done += unit.bytes
            if self.meter is not None:
                self.meter.set(done)

    def skip(self, fault: Fault) -> None:
        """Count a fault, or raise it."""
        if fault.error is not None and self.task["on_error"] == "fail":
            raise fault.error()
        if fault.reason not in self.skipped:
            error = None if fault.error is None else fault.error()
            first = list(error.args) if isinstance(error, LineError) else str(error or "")
            self.skipped[fault.reason] = [0, first]
        self.skipped[fault.reason][0] += 1

    def _rows(self, unit: Unit) -> Iterator[tuple[str, dict[str, Any]] | Fault]:
        if self.columns:
            return self.source.read_columns(unit, self.columns)
        return (row if isinstance(row, Fault) else (row, {}) for row in self.source.read(unit))


def load_task(work: Path, rank: int) -> dict[str, Any]:
    """What WORK/tasks says about a task."""
    return json.loads(numbered(work / "tasks", rank, ".json").read_text(encoding="utf-8"))


def load_tasks(work: Path) -> list[dict[str, Any]]:
    """The same of all tasks, in their order."""
    files = sorted((work / "tasks").glob("*.json"), key=lambda file: int(file.stem))  # as texts, 100000 is before 10001
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


class ReadUnits(PipelineStep):
    """The documents of a task's units, in order."""

    type, name = "READER", "units of a source"

    def __init__(self, work: Path, first: int = 0, meter: bool = True) -> None:
        """
        Args:
            first: task that rank 0 of this pipeline reads.
            meter: count the units' bytes as progress; else a later step does.
        """
        super().__init__()
        self.work, self.first, self.meter = work, first, meter

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        meter = Meter(self.work, rank) if self.meter else None
        yield from TaskDocuments(load_task(self.work, self.first + rank), meter)


class Scan(PipelineStep):
    """Read a task; filter, digest and measure every document."""

    type, name = "STATS", "scan"

    def __init__(self, work: Path, filters: Mapping[str, Sequence[DocumentFilter | None]]) -> None:
        """filters: of each stream, in the order of the config; None where a filter of whole streams stands."""
        super().__init__()
        self.work, self.filters = work, filters

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        task = load_task(self.work, rank)
        filters = [(number, each) for number, each in enumerate(self.filters[task["stream"]], 1) if each is not None]
        digests, sizes, filtered = bytearray(), [], bytearray()
        documents = TaskDocuments(task, Meter(self.work, rank))
        for document in documents:
            content = document.text.encode("utf-8")
            digests += digest(content)
            sizes.append(len(content))
            number = _rejecting(filters, document, len(sizes))
            if isinstance(number, Fault):
                documents.skip(number)
                number = ODD
            filtered.append(number)
        numbers = digests_to_numbers(bytes(digests))
        arrays = {"sizes": np.array(sizes, np.int64), "filtered": np.frombuffer(bytes(filtered), np.uint8)}
        there = np.flatnonzero((arrays["filtered"] == 0) & (arrays["sizes"] > 0))
        there = there[np.lexsort((numbers[there, 1], numbers[there, 0]))]  # stable: equal ones stay in order
        save_array(numbered(self.work / "scan", rank, ".sorted.npy"), np.ascontiguousarray(numbers[there].T))
        save_array(numbered(self.work / "scan", rank, ".order.npy"), there.astype(np.uint32))
        save_arrays(numbered(self.work / "scan", rank, ".npz"), digests=numbers, **arrays)
        write_file(numbered(self.work / "scan", rank, ".skipped.json"), json.dumps(documents.skipped).encode())
        yield from ()


def _rejecting(filters: Sequence[tuple[int, DocumentFilter]], document: Document, position: int) -> int | Fault:
    """Number of the first filter that rejects the document, or 0; a Fault when its columns make no sense to one."""
    for number, each in filters:
        try:
            if not each.keeps(document.text, document.metadata["columns"]):
                return number
        except ValueError as error:
            place = f"{document.metadata['place']}: document {position} of its part"
            message = f"{place}: filter {each.config.name!r}: {error}"
            return Fault(f"filter {each.config.name!r}: wrong column value", partial(RunError, shown(message)))
    return 0


class Select(PipelineStep):
    """The documents that a plan keeps, with their split in metadata. Raises RunError when the source has changed."""

    type, name = "FILTER", "plan"

    def __init__(self, work: Path, folder: str = "plan", first: int = 0) -> None:
        """folder: of WORK; its NNNNN.npz hold `splits`. first: task that rank 0 of this pipeline reads."""
        super().__init__()
        self.work, self.folder, self.first = work, folder, first

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        expected = load_scan(self.work, self.first + rank, "digests")["digests"].astype(">u8").tobytes()
        with np.load(numbered(self.work / self.folder, self.first + rank, ".npz")) as plan:
            splits = plan["splits"].tolist()
        count = 0
        for document in data:
            content = document.text.encode("utf-8")
            if digest(content) != expected[16 * count : 16 * count + 16]:
                raise self._changed(document.metadata["place"])
            if splits[count] != DROPPED:
                document.metadata |= {"split": splits[count], "bytes": len(content)}
                yield document
            count += 1
        if count != len(splits):
            raise self._changed("a source")

    def _changed(self, place: str) -> RunError:
        return RunError(
            f"{shown(place)}: changed while it was being prepared: delete {self.work.parent} and prepare again"
        )
