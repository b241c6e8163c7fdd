"""Pushing what a run has to publish: what is whole and the same at the target is left, and the rest is made so.

RUN/publish.json remembers what was pushed where, so that a look at hundreds of revisions reads no weights. It is no
more than that: without it, or with a wrong one, the target's own content decides.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from data.store.transfer import TransferError
from evals.publishing.revisions import Revision, find_revisions
from evals.publishing.target import MAIN, open_target
from flexbert_core.durable import HeldError, lock, write_file
from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import ConfigError, RunError
from recipe.config import RunConfig
from training.folder import RunFolder

log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.5
_STATE, _LOCK = "publish.json", ".publish-lock"


class Plan(NamedTuple):
    """What is to be done. there: revisions that are whole and as they should be. main: the revision that `main` is to
    become; None: it stays."""

    where: str
    there: list[Revision]
    missing: list[Revision]
    main: Revision | None


class Publishing:
    """Of one run, by one process at a time."""

    def __init__(self, folder: RunFolder, config: RunConfig, results: Sequence[Path] = ()) -> None:
        """results: see `find_revisions`; those given at earlier times count, too. Raises ConfigError for a config that
        names no target, or one that cannot be used here."""
        if config.publish is None:
            raise ConfigError(
                f"{folder.path}: its run file has no `publish`: say where to: publish.folder=DIR, publish.url=s3://... "
                "or publish.repo=ORG/NAME"
            )
        for path in results:
            if not path.is_dir():
                raise ConfigError(f"--results: {path}: no such folder: give one that `main.py eval` wrote to")
        self.folder, self.config = folder, config
        self.target = _plain(lambda: open_target(config))
        self.results = [str(path.resolve()) for path in results]
        self._read_state()

    def plan(self, only: str | None = None) -> Plan:
        """Compare the run with the target. only: one revision. Raises ConfigError when the run has none of that name,
        or the target refuses; RunError when it cannot be reached."""
        results = [Path(path) for path in self.state["results"]]
        found: list[Revision] = _plain(lambda: find_revisions(self.folder, self.config, results))
        names = [revision.name for revision in found]
        if only is not None and only not in names:
            known = did_you_mean(only, names) if names else "it has none yet"
            raise ConfigError(f"--only: {only}: {self.folder.path} has no such export, {known}")
        versions = _plain(self.target.versions)
        there = [each for each in found if self._is_there(each, each.name, versions)]
        missing = [each for each in found if each not in there and only in (None, each.name)]
        coming = [each for each in found if not each.average and (each in there or each in missing)]
        newest = coming[-1] if coming else None
        main = None if newest is None or self._is_there(newest, MAIN, versions) else newest
        if main is not None and (only not in (None, main.name) or main.tokens < _newest(versions)):
            main = None  # what is newer there comes from a run that has gone on elsewhere, or lost an export since
        return Plan(self.target.where, there, missing, main)

    def push(self, only: str | None = None, say: Callable[[str], None] = log.info, wait: bool = False) -> int:
        """Do what `plan` says, until nothing is left: exports may come while it is at work. Returns how many revisions
        were pushed. wait: for another process that publishes this run. Raises as `plan`, and RunError when there is
        one."""
        handle, pushed = self._lock(wait), 0
        done: set[tuple[str, str]] = set()
        self._read_state()  # another process may have held the lock until now
        try:
            while (plan := self.plan(only)).missing or plan.main is not None:
                coming = {(each.name, each.stamp) for each in plan.missing}
                coming |= {(MAIN, plan.main.stamp)} if plan.main is not None else set()
                if coming <= done:  # the target shows what was pushed with a delay, or someone changes it: next time
                    break
                done |= coming
                _plain(self.target.open)
                for revision in plan.missing:
                    files = _plain(revision.files)
                    version = _plain(partial(self.target.push, revision.name, files))
                    self._note(revision, revision.name, version)
                    say(f"{revision.name} is at {self.target.where}")
                    pushed += 1
                if plan.main is not None:
                    files = _plain(plan.main.files)
                    self._note(plan.main, MAIN, _plain(partial(self.target.set_main, plan.main.name, files)))
                    say(f"main is {plan.main.name}")
            return pushed
        finally:
            handle.close()

    def _read_state(self) -> None:
        self.state = _state_of(self.folder.path / _STATE)
        if self.state["where"] != self.target.where:
            self.state |= {"where": self.target.where, "revisions": {}}
        self.state["results"] = sorted({*self.state["results"], *self.results})

    def _lock(self, wait: bool) -> TextIO:
        while True:
            try:
                return lock(self.folder.path / _LOCK, self.folder.path, "publishing this run")
            except HeldError:
                if not wait:
                    raise
                time.sleep(_LOOK_SECONDS)

    def _is_there(self, revision: Revision, name: str, versions: dict[str, str]) -> bool:
        noted = self.state["revisions"].get(name, {})
        return noted == {"stamp": revision.stamp, "version": versions.get(name)}

    def _note(self, revision: Revision, name: str, version: str) -> None:
        self.state["revisions"][name] = {"stamp": revision.stamp, "version": version}
        write_file(self.folder.path / _STATE, json.dumps(self.state, indent=1) + "\n")


def _newest(versions: dict[str, str]) -> int:
    """Tokens of the newest revision of weights that is there; -1 without one."""
    plain = [name.removeprefix("tokens-") for name in versions]
    return max((int(tokens) for tokens in plain if tokens.isdecimal()), default=-1)


def _state_of(file: Path) -> dict[str, Any]:
    empty: dict[str, Any] = {"where": None, "results": [], "revisions": {}}
    try:
        node = json.loads(file.read_text())
        return {key: node[key] if isinstance(node[key], type(empty[key] or node[key])) else empty[key] for key in empty}
    except (OSError, ValueError, KeyError, TypeError):
        return empty


def _plain(act: Callable[[], Any]) -> Any:
    """Faults of a target as the command's: what refuses is the user's to mend, what cannot be reached may come back."""
    try:
        return act()
    except TransferError as error:
        raise (ConfigError if error.kind == "denied" else RunError)(str(error)) from None
    except OSError as error:
        raise RunError(f"{error.filename or 'publish'}: {error.strerror or error}") from None
