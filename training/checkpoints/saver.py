"""Writing checkpoints beside training, and which of them are kept."""

import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from flexbert_core.durable import remove_folder
from flexbert_core.schema import RunError
from ranks import from_rank_0, rank
from recipe.sections import CheckpointConfig
from training.checkpoints.files import Snapshot, list_checkpoints, write_checkpoint
from training.checkpoints.remote import NotCopiedError, RemoteCheckpoints
from training.checkpoints.retention import Facts, facts_of, surplus

log = logging.getLogger(__name__)

Job = tuple[Path, Snapshot, dict[str, Any]]


class Saver:
    """Writes on rank 0 in a thread, one checkpoint at a time, then removes old ones and copies it to checkpoint.remote.

    A write that fails (a full disk) is said at once; training goes on and the next interval tries again. Older
    checkpoints are removed only after a newer one is whole. `max_failures` in a row end the run on all ranks. A bug in
    the thread ends it, too, with its traceback. A copy that fails is a failure like another, but what is whole on the
    local disk is kept there by its own rules.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        is_permanent: Callable[[int], bool],
        note: Callable[[Path], None] = lambda path: None,
        remote: RemoteCheckpoints | None = None,
    ) -> None:
        """is_permanent: whether the checkpoint after so many steps is kept for ever. note: told of each whole one.
        remote: on every rank, which waits for the copy."""
        self.folder, self.config, self.is_permanent = folder, config, is_permanent
        self.note, self.remote = note, remote
        self._thread: threading.Thread | None = None
        self._failed: Job | None = None
        self._uncopied = False  # whether all that failed was the copy
        self._crash: BaseException | None = None
        self._failures = 0

    def start(self, path: Path, snapshot: Snapshot, state: dict[str, Any]) -> None:
        """Begin to write (rank 0); `settle` must have been called since the last one."""
        self._begin(partial(self._write, (path, snapshot, state)))

    def settle(self) -> None:
        """Wait for the write under way. A collective. Raises RunError after too many failures in a row."""
        self._wait()
        self._failed = None  # the next one replaces it
        failures = from_rank_0(self._failures)
        if failures >= self.config.max_failures:
            raise RunError(
                f"{self.folder}: {failures} checkpoints in a row could not be written, or copied to checkpoint.remote "
                "(checkpoint.max_failures); older ones are whole: make room, or mend what was said, then the same "
                "command goes on from the newest"
            )

    def settle_last(self, finished: bool = True) -> None:
        """Like `settle`, after which nothing more is saved: a failed write is tried once more, now. A collective.

        Raises RunError when that fails too. finished: false when another process will go on, which copies what could
        not be copied here.
        """
        self._wait()
        newest = list_checkpoints(self.folder)[-1:]
        if self._failed is not None:
            self._begin(partial(self._write, self._failed))
        elif finished and self.remote is not None and newest and rank() == 0:
            # what an earlier process could not copy at its end
            self._begin(partial(self._attempt, None, partial(self._copy, newest[0], written=False)))
        self._wait()
        lost = self._failed is not None or self._uncopied
        if from_rank_0(lost and (finished or not self._uncopied)):
            raise RunError(
                f"{self.folder}: the last checkpoint could not be written, or copied to checkpoint.remote; older ones "
                "are whole: make room, or mend what was said"
            )

    def _begin(self, act: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=act, name="checkpoint")
        self._thread.start()

    def _wait(self) -> None:
        """For what rank 0 writes. A collective with a remote, whose copies take their time."""
        if self.remote is not None:
            self.remote.wait(self._thread)
        self.join()

    def join(self) -> None:
        """Wait for the write under way (rank 0). Raises what was no failure to write but a bug."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._crash is not None:
            crash, self._crash = self._crash, None
            raise crash

    def _write(self, job: Job) -> None:
        def write() -> None:
            write_checkpoint(*job)
            self.note(job[0])
            try:
                remove_old_checkpoints(self.folder, self.config, self.is_permanent, job[0])
            finally:
                self._copy(job[0], written=True)
                self._failures = 0

        self._attempt(job, write)

    def _copy(self, path: Path, written: bool) -> None:
        if self.remote is not None:
            self.remote.copy(path, self.config, self.is_permanent, written=written)

    def _attempt(self, job: Job | None, act: Callable[[], None]) -> None:
        self._failed, self._uncopied = None, False
        try:
            act()
        except (RunError, OSError) as error:
            self._failed = job
            self._failures += 1
            self._uncopied = isinstance(error, NotCopiedError)
            what = "COPIED" if self._uncopied else "WRITTEN"
            log.error("CHECKPOINT NOT %s (failure %d in a row), training goes on: %s", what, self._failures, error)
        except BaseException as error:
            log.exception("the thread that writes checkpoints crashed; the run ends at the next checkpoint")
            self._crash = error


def remove_old_checkpoints(
    folder: Path, config: CheckpointConfig, is_permanent: Callable[[int], bool], newest: Path
) -> None:
    """Delete what training.retention does not keep. newest: just written."""
    facts = {path: _facts(path) for path in list_checkpoints(folder)}
    for path in surplus(facts, newest, config, is_permanent):
        remove_folder(path)


def _facts(path: Path) -> Facts:
    try:
        return facts_of((path / "state.json").read_bytes())
    except OSError:
        return Facts(0, None)
