"""Writing checkpoints beside training, and which of them are kept."""

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from callbacks.agree import from_rank_0
from durable import remove_folder
from schema import RunError
from training.checkpoint import Snapshot, list_checkpoints, write_checkpoint
from training.config import CheckpointConfig

log = logging.getLogger(__name__)

Job = tuple[Path, Snapshot, dict[str, Any]]


class Saver:
    """Writes on rank 0 in a thread, one checkpoint at a time, and removes old ones after each.

    A write that fails (a full disk) is said at once; training goes on and the next interval tries again. Older
    checkpoints are removed only after a newer one is whole. `max_failures` in a row end the run on all ranks. A bug in
    the thread ends it, too, with its traceback.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        is_permanent: Callable[[int], bool],
        note: Callable[[Path], None] = lambda path: None,
    ) -> None:
        """is_permanent: whether the checkpoint after so many steps is kept for ever. note: told of each whole one."""
        self.folder, self.config, self.is_permanent, self.note = folder, config, is_permanent, note
        self._thread: threading.Thread | None = None
        self._failed: Job | None = None
        self._crash: BaseException | None = None
        self._failures = 0

    def start(self, path: Path, snapshot: Snapshot, state: dict[str, Any]) -> None:
        """Begin to write (rank 0); `settle` must have been called since the last one."""
        self._thread = threading.Thread(target=self._write, args=((path, snapshot, state),), name="checkpoint")
        self._thread.start()

    def settle(self) -> None:
        """Wait for the write under way. A collective. Raises RunError after too many failures in a row."""
        self.join()
        self._failed = None  # the next one replaces it
        failures = from_rank_0(self._failures)
        if failures >= self.config.max_failures:
            raise RunError(
                f"{self.folder}: {failures} checkpoints in a row could not be written (checkpoint.max_failures); older "
                "ones are whole: make room, then the same command goes on from the newest"
            )

    def settle_last(self) -> None:
        """Like `settle`, after which nothing more is saved: a failed write is tried once more, now. A collective.

        Raises RunError when that fails too.
        """
        self.join()
        if self._failed is not None:
            self._write(self._failed)
        if from_rank_0(self._failed is not None):
            raise RunError(f"{self.folder}: the last checkpoint could not be written; older ones are whole: make room")

    def join(self) -> None:
        """Wait for the write under way (rank 0). Raises what was no failure to write but a bug."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._crash is not None:
            crash, self._crash = self._crash, None
            raise crash

    def _write(self, job: Job) -> None:
        self._failed = None
        try:
            write_checkpoint(*job)
            self.note(job[0])
            self._failures = 0
            remove_old_checkpoints(self.folder, self.config, self.is_permanent, job[0])
        except (RunError, OSError) as error:
            self._failed = job
            self._failures += 1
            log.error("CHECKPOINT NOT WRITTEN (failure %d in a row), training goes on: %s", self._failures, error)
        except BaseException as error:
            log.exception("the thread that writes checkpoints crashed; the run ends at the next checkpoint")
            self._crash = error


def remove_old_checkpoints(
    folder: Path, config: CheckpointConfig, is_permanent: Callable[[int], bool], newest: Path
) -> None:
    """Delete all but the permanent ones, and of the others the newest `keep` and the `keep_best` of the lowest
    validation loss (of equal ones the newest).

    newest: just written. What is there of later steps was skipped as damaged, and must not count as one of `keep`.
    """
    paths = list_checkpoints(folder)
    later = paths[paths.index(newest) + 1 :]
    for path in later:
        remove_folder(path)
    paths = paths[: -len(later) or None]
    facts = {path: _facts(path) for path in paths}
    paths = [path for path in paths if not is_permanent(facts[path][0])]
    judged = [path for path in reversed(paths) if facts[path][1] is not None]
    best = sorted(judged, key=lambda path: facts[path][1] or 0.0)[: config.keep_best]
    for path in paths[: -config.keep]:
        if path not in best:
            remove_folder(path)


def _facts(path: Path) -> tuple[int, float | None]:
    """A checkpoint's step and the validation loss at it. Of a damaged one: step 0, none."""
    try:
        state = json.loads((path / "state.json").read_text())["run"]
        return int(state["step"]), state.get("validation_loss")
    except (OSError, ValueError, KeyError, TypeError):
        return 0, None
