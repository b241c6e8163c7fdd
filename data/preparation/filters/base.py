"""What a filter is: one class that says which documents of a stream are kept.

Document filters look at one document and run while the source is read, in the order of the config; the first that
rejects a document counts it. Then exact copies are dropped (`deduplicate`), then stream filters compare what is left
with one another, then `max_bytes` draws.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep
from numpy.typing import NDArray

from flexbert_core.schema import Registry

FILTERS = Registry("filter", has_imports=False)

Run = Callable[[str, Sequence[PipelineStep], Sequence[int]], None]
"""Run a datatrove pipeline on the config's executor: name, steps, and a size per task (for progress; bytes)."""


class DocumentFilter:
    """Base of a filter that looks at one document: built from its Config alone, in every worker anew."""

    columns: Sequence[str] = ()
    """Columns of the source that `keeps` wants to see."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def keeps(self, text: str, columns: Mapping[str, Any]) -> bool:
        """Whether the document stays. Must depend on nothing but the arguments and the config.

        Raises ValueError, saying what is wrong with a column's value.
        """
        raise NotImplementedError


class StreamFilter:
    """Base of a filter that compares the documents of a stream with one another."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def drop(
        self, documents: Sequence[PipelineStep], counts: Sequence[int], sizes: Sequence[int], folder: Path, run: Run
    ) -> Iterable[NDArray[np.int64]]:
        """For each task the documents to drop, as ascending positions among its documents.

        Must not depend on how many workers `run` has, and must give the same when it is repeated after a kill.

        Args:
            documents: steps that read the documents of a task.
            counts: how many documents each task has.
            sizes: bytes of each task, for progress.
            folder: to work in; removed when the dataset is finished.
        """
        raise NotImplementedError
