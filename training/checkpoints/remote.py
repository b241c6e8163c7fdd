"""Copies of a run's checkpoints behind a URL (checkpoint.remote), for a machine whose disk may not be there tomorrow.

URL/NAME/tokens-N/ holds the files of checkpoints/tokens-N/. Its manifest is written last and deleted first: without one
it is half copied, and never taken for whole. Beside them lie the run's files that tell its history, written before the
manifest of the checkpoint that they belong to; lines of later steps are dropped on resuming, as after any kill.
"""

import io
import json
import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from callbacks.ledger import Ledger, knows_rollbacks
from data.store.transfer import Patience, Store, TransferError, open_store, with_retries
from flexbert_core.durable import holder, new_folder, write_file
from flexbert_core.schema import ConfigError, RunError
from ranks import from_rank_0, wait_for_rank_0
from recipe.config import RunConfig
from recipe.sections import CheckpointConfig
from training.begun import as_begun
from training.checkpoints.files import MANIFEST, list_checkpoints, newest_whole, tokens_of, verify_checkpoint
from training.checkpoints.retention import Facts, facts_of, surplus
from training.folder import RunFolder

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.2  # between looks at a copy
_HISTORY = ("config.yaml", "origin.json", "teacher.json", "ledger.jsonl", "metrics.jsonl")
_STATE = "state.json"
_RETRIES = 3  # of a write: the next checkpoint tries again, and until then training waits for this one to end


class NotCopiedError(RunError):
    """A checkpoint is whole on the local disk, but not behind the URL."""


class RemoteCheckpoints:
    """Those of one run. Rank 0 alone reads and writes there, one thread at a time."""

    def __init__(self, config: RunConfig, beat: Callable[[], None] = lambda: None) -> None:
        """beat: told on every rank that waits that a copy gets on."""
        assert config.checkpoint.remote is not None
        self.beat, self._moves = beat, 0  # parts of files that were read to be copied
        self.url = f"{config.checkpoint.remote.rstrip('/')}/{config.name}"
        self._patience = Patience(config.data.download_retries, config.data.download_timeout)
        self._writing = self._patience._replace(retries=min(_RETRIES, config.data.download_retries))
        self._facts: dict[str, Facts] = {}

    def copy(
        self, newest: Path, config: CheckpointConfig, is_permanent: Callable[[int], bool], *, written: bool = True
    ) -> None:
        """Copy a checkpoint that was just written, and older local ones that an earlier attempt left out; then delete
        there what is kept no longer. What was whole stays whole, unless it is this one, or of steps after it.

        written: false when the newest may have been copied already. Raises NotCopiedError.
        """
        try:
            store = open_store(self.url, self._writing)
            found = self._checkpoints(store)
            for name in [name for name in found if _tokens(name) > tokens_of(newest)]:
                self._remove(store, name, found.pop(name))
            for file in (newest.parent.parent / name for name in _HISTORY):
                if file.exists():
                    self._write(store, file.name, io.BytesIO(file.read_bytes()))
            for path in list_checkpoints(newest.parent):
                if MANIFEST not in found.get(path.name, ()) or (written and path == newest):
                    self._upload(store, path)
                    found[path.name] = [file.name for file in path.iterdir()]
            for name in [name for name in found if MANIFEST not in found[name]]:
                self._remove(store, name, found.pop(name))  # half copied by a machine that is gone: no more will come
            facts = {name: self._facts_of(store, name, found[name]) for name in sorted(found, key=_tokens)}
            for name in surplus(facts, newest.name, config, is_permanent):
                self._remove(store, name, found[name])
        except (TransferError, OSError) as error:
            raise NotCopiedError(f"{self.url}: {newest.name} not copied: {error}; it is whole in {newest}") from error

    def wait(self, thread: threading.Thread | None) -> None:
        """Let rank 0's thread finish, which writes a checkpoint and copies it. All ranks call it, and none hangs as
        long as the copy gets on: by its time-outs each part of it ends."""

        def work(got_on: Callable[[], None]) -> None:
            seen = self._moves
            while thread is not None and thread.is_alive():
                thread.join(_LOOK_SECONDS)
                if self._moves != seen:
                    seen = self._moves
                    got_on()

        wait_for_rank_0(work, self.beat)

    def fetch(self, folder: RunFolder, config: RunConfig) -> None:
        """Bring the newest whole checkpoint into the run folder when none there is as new: on a fresh machine, where
        its own are damaged, or where the run has gone on elsewhere since. Others are skipped, loudly. Beats for each
        block that comes.

        Raises RunError when the folder has no whole one and none of those there is of use, or the server cannot be
        reached: starting over, or from an older one, would silently lose what is there; ConfigError when the run was
        started with a config that trains otherwise.
        """
        here, skipped = newest_whole(folder.checkpoints), Ledger(folder.ledger, []).skips()
        try:
            store = open_store(self.url, self._patience)
            found = {name: files for name, files in self._checkpoints(store).items() if _tokens(name) > here}
            whole = [name for name in sorted(found, key=_tokens, reverse=True) if MANIFEST in found[name]]
            for name in found.keys() - whole:
                log.warning("SKIPPING HALF-COPIED CHECKPOINT %s/%s: it has no manifest", self.url, name)
            if skipped:  # here the run went back to an older one, and was ended before the next copy
                whole = [name for name in whole if self._knows(store, name, skipped)]
            if whole:
                self._fetch_history(store, folder)
                folder.check_config(as_begun(config, folder))
            for name in whole:
                try:
                    with new_folder(folder.checkpoints / name) as beside:
                        for file in found[name]:
                            self._download(store, f"{name}/{file}", beside / file)
                        verify_checkpoint(beside)
                except RunError as error:
                    log.warning("SKIPPING DAMAGED CHECKPOINT %s/%s: %s", self.url, name, error)
                else:
                    log.warning("%s: %s comes from %s", folder.path, name, self.url)
                    return
        except (TransferError, OSError) as error:
            fix = "mend that, or leave checkpoint.remote out to go on without"
            raise RunError(f"{self.url}: cannot look for checkpoints: {error}: {fix}") from None
        if whole and here < 0:
            raise RunError(f"{self.url}: none of the {len(whole)} checkpoints is whole: delete them to start over")

    def probe(self) -> int:
        """Write, list and delete a small file, as `copy` would. Returns the number of checkpoints there; raises
        TransferError."""
        store = open_store(self.url, self._patience)
        self._write(store, ".doctor", io.BytesIO(b"x"))
        with_retries(partial(store.remove, ".doctor"), self._writing)
        return len(self._checkpoints(store))

    def _checkpoints(self, store: Store) -> dict[str, list[str]]:
        """The files of each checkpoint there, half copied ones too."""
        try:
            files = store.sizes([])
        except TransferError as error:
            if error.kind == "missing":
                return {}
            raise
        found: dict[str, list[str]] = {}
        for file in sorted(files):
            name, _, rest = file.partition("/")
            if rest and "/" not in rest and name.removeprefix("tokens-").isdecimal():
                found.setdefault(name, []).append(rest)
        return found

    def _write(self, store: Store, name: str, content: BinaryIO) -> None:
        def attempt() -> None:
            content.seek(0)
            store.write(name, content)

        with_retries(attempt, self._writing)

    def _upload(self, store: Store, path: Path) -> None:
        with_retries(partial(store.remove, f"{path.name}/{MANIFEST}"), self._writing)
        for file in sorted(path.iterdir(), key=lambda file: file.name == MANIFEST):
            with io.BufferedReader(_Read(file, self._moved)) as content:
                self._write(store, f"{path.name}/{file.name}", content)
        self._facts[path.name] = facts_of((path / _STATE).read_bytes())

    def _moved(self) -> None:
        self._moves += 1

    def _remove(self, store: Store, name: str, files: list[str]) -> None:
        for file in sorted(files, key=lambda file: file != MANIFEST):
            with_retries(partial(store.remove, f"{name}/{file}"), self._writing)
        self._facts.pop(name, None)

    def _facts_of(self, store: Store, name: str, files: list[str]) -> Facts:
        if _STATE not in files:
            return Facts(0, None)
        if name not in self._facts:
            self._facts[name] = facts_of(self._read(store, f"{name}/{_STATE}"))
        return self._facts[name]

    def _knows(self, store: Store, name: str, skipped: list[range]) -> bool:
        try:
            return knows_rollbacks(json.loads(self._read(store, f"{name}/{_STATE}"))["run"], skipped)
        except (ValueError, KeyError, TypeError):
            log.warning("SKIPPING DAMAGED CHECKPOINT %s/%s: %s is damaged", self.url, name, _STATE)
            return False

    def _read(self, store: Store, name: str) -> bytes:
        return with_retries(lambda: b"".join(map(bytes, store.blocks(name))), self._patience)

    def _fetch_history(self, store: Store, folder: RunFolder) -> None:
        folder.path.mkdir(parents=True, exist_ok=True)
        there = store.sizes([])
        for name in _HISTORY:
            if name in there:
                write_file(folder.path / name, self._read(store, name))

    def _download(self, store: Store, name: str, file: Path) -> None:
        def attempt() -> None:
            with file.open("wb") as out:
                for block in store.blocks(name):
                    out.write(block)
                    self.beat()

        with_retries(attempt, self._patience)


class _Read(io.FileIO):
    """A file that says when it is read."""

    def __init__(self, file: Path, moved: Callable[[], None]) -> None:
        super().__init__(file, "rb")
        self._moved = moved

    def readinto(self, buffer: "WriteableBuffer", /) -> int | None:
        self._moved()
        return super().readinto(buffer)


def _tokens(name: str) -> int:
    return tokens_of(Path(name))


def fetch_newest(config: RunConfig, folder: RunFolder, beat: Callable[[], None]) -> None:
    """Before anything else looks into a run folder: see RemoteCheckpoints.fetch. A collective. beat: is told on every
    rank that what is fetched gets on."""
    problem = None

    def fetch(got_on: Callable[[], None]) -> None:
        nonlocal problem
        if holder(folder.lock) is not None:  # opening the folder will say so
            return
        try:
            RemoteCheckpoints(config, got_on).fetch(folder, config)
        except (ConfigError, RunError) as error:
            problem = isinstance(error, ConfigError), str(error)

    if config.checkpoint.remote is not None:
        wait_for_rank_0(fetch, beat)
    problem = from_rank_0(problem)
    if problem is not None:
        raise (ConfigError if problem[0] else RunError)(problem[1])
