"""Exact copies among any number of documents: sorted digests of each task, compared one range of digests at a time.

Memory: about 100 bytes for each document of a range, of which there are at most PARTITION_DOCUMENTS on average (digests
are uniform), whatever the size of the corpus; the caller's array has 1 byte for each document of the stream.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.preparation.documents import load_array, mark, numbered, save_array

PARTITION_DOCUMENTS = 2**22


class DigestFiles:
    """The sorted digests of one task, cut into ranges of the digests' first word."""

    def __init__(self, digests: Path, order: Path | None, done: Path | None, edges: NDArray[np.uint64]) -> None:
        """done: what says that these files are there, as in load_array."""
        self._digests, self._order, self._done = digests, order, done
        self._bounds = [0, *np.searchsorted(load_array(digests, done)[0], edges).tolist(), None]

    def range(self, number: int) -> tuple[NDArray[np.uint64], NDArray[np.uint32] | None]:
        """Digests (2, documents) of one range, ascending, and the documents' positions in the task."""
        part = slice(self._bounds[number], self._bounds[number + 1])
        order = None if self._order is None else load_array(self._order, self._done)[part].copy()
        return load_array(self._digests, self._done)[:, part].copy(), order


def find_copies(
    work: Path, ranks: Sequence[int], starts: Sequence[int], earlier: Sequence[int]
) -> Iterator[NDArray[np.int64]]:
    """Positions in the stream, in no order, of the documents that are copies of an earlier one; those of a range each.

    Args:
        ranks: tasks of the stream, scanned.
        starts: position of each task's first document in the stream.
        earlier: tasks of earlier streams, of which `keep_digests` wrote what is kept; copies of those count too.
    """
    scan, kept = work / "scan", work / "kept"
    own = [numbered(scan, rank, ".sorted.npy") for rank in ranks]
    before = [numbered(kept, rank, ".sorted.npy") for rank in earlier]
    marks = [mark(work, "scan", rank) for rank in ranks]
    total = sum(
        load_array(file, done).shape[1]
        for file, done in (*zip(own, marks, strict=True), *((file, None) for file in before))
    )
    partitions = max(1, -(-total // PARTITION_DOCUMENTS))
    edges = np.array([2**64 * number // partitions for number in range(1, partitions)], np.uint64)
    files = [
        DigestFiles(file, numbered(scan, rank, ".order.npy"), done, edges)
        for file, rank, done in zip(own, ranks, marks, strict=True)
    ]
    files_before = [DigestFiles(file, None, None, edges) for file in before]
    for number in range(partitions):
        pieces = [file.range(number)[0] for file in files_before]
        count_before = sum(piece.shape[1] for piece in pieces)
        positions = [np.zeros(0, np.int64)]
        for file, start in zip(files, starts, strict=True):
            digests, order = file.range(number)
            assert order is not None
            pieces.append(digests)
            positions.append(order + np.int64(start))
        repeated = _repeated(np.concatenate([np.zeros((2, 0), np.uint64), *pieces], axis=1))[count_before:]
        yield np.concatenate(positions)[repeated]


def keep_digests(work: Path, rank: int, kept: NDArray[np.bool_]) -> None:
    """Write the digests of a task's kept documents to where find_copies of a later stream looks. kept: (documents,)."""
    (work / "kept").mkdir(exist_ok=True)
    digests = load_array(numbered(work / "scan", rank, ".sorted.npy"), mark(work, "scan", rank))
    order = load_array(numbered(work / "scan", rank, ".order.npy"), mark(work, "scan", rank))
    save_array(numbered(work / "kept", rank, ".sorted.npy"), digests[:, kept[order]])


def _repeated(digests: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which digests, (2, documents), are equal to one before them."""
    order = np.lexsort((digests[1], digests[0]))  # stable: equal ones stay in document order
    ordered = digests[:, order]
    repeated = np.zeros(digests.shape[1], bool)
    repeated[order[1:]] = (ordered[:, 1:] == ordered[:, :-1]).all(0)
    return repeated
