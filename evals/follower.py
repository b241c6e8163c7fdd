"""The process that evaluates a run's checkpoints: each once, also those of before a restart.

RUN/evaluations holds the results as `main.py eval` writes them; evals.following says what else is written.
"""

import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from callbacks.step_log import append_line
from evals.config import build_eval
from evals.driver import evaluate
from evals.following import Following, adopt, following_of, mark_of
from evals.models import resolve
from evals.results import numbers, write_results
from flexbert_core.durable import HeldError, lock, remove_folder, sync
from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import ConfigError, RunError
from training.checkpoints.files import tokens_of
from training.folder import RunFolder

_POLL_SECONDS = 1.0


def follow(run: Path, console: Console, watch: bool, title: str | None = None) -> bool:
    """Evaluate what waits; watch: until the run is finished, else once. Whether all went well. title: of one entry;
    default: all.

    Raises ConfigError for what can never be evaluated; RunError when another process follows the run, for which
    watching waits, and when nothing can be written.
    """
    everyone = following_of(run)
    if title is not None and title not in (titles := [each.title for each in everyone]):
        raise ConfigError(f"{run}: none of its entries `eval` is {title!r}, {did_you_mean(title, titles)}")
    followers = [_Follower(each, console) for each in everyone if title in (None, each.title)]
    folder = RunFolder(run)
    try:
        with ExitStack() as held:
            for follower in followers:
                held.enter_context(follower.lock(watch))
            if not watch:
                adopt(run, everyone)
            while True:
                finished = folder.finished() is not None  # asked before: what it wrote last is seen
                for follower in followers if finished or not watch else ():  # else the training process does
                    follower.following.pin_all()
                if any([follower.evaluate_waiting() for follower in followers]):
                    continue
                if finished or not watch:
                    return all(follower.fine for follower in followers)
                time.sleep(_POLL_SECONDS)
    except OSError as error:
        raise RunError(f"{error.filename or run}: evaluations cannot go on: {error.strerror or error}") from error


class _Follower:
    """Works for one entry."""

    def __init__(self, following: Following, console: Console) -> None:
        """Raises ConfigError for an evaluation that cannot be made here."""
        self.following, self.console = following, console
        self.evaluations = {
            name: (file, build_eval(file.evaluation, name), again) for name, (file, again) in following.load().items()
        }
        self.fine = True
        self._tried: set[tuple[int, str | None, str]] = set()

    def lock(self, wait: bool) -> TextIO:
        """Raises RunError when another process holds it, unless told to wait: one that was killed may take a moment to
        be gone."""
        said = False
        while True:
            try:
                return lock(
                    self.following.lock, self.following.run, f"evaluating its checkpoints ({self.following.title})"
                )
            except HeldError as error:
                if not wait:
                    raise
                if not said:
                    self.console.print(f"waiting: {error}", soft_wrap=True)
                said = True
            time.sleep(_POLL_SECONDS)

    def evaluate_waiting(self) -> bool:
        """All that waits now, and was not tried. Whether there was something."""
        busy = False
        for path in self.following.waiting():
            while todo := self._todo(path):
                busy = True
                shutil.rmtree(self.following.scratch, ignore_errors=True)
                for name in todo:
                    self._evaluate(path, name)
                shutil.rmtree(self.following.scratch, ignore_errors=True)
            if path.exists() and not self.following.missing(path):  # what failed waits for the next start
                remove_folder(path)
        return busy

    def _todo(self, path: Path) -> list[str]:
        mark = mark_of(path)
        return [name for name in self.following.missing(path) if (tokens_of(path), mark, name) not in self._tried]

    def _evaluate(self, path: Path, name: str) -> None:
        following, tokens, mark = self.following, tokens_of(path), mark_of(path)
        self._tried.add((tokens, mark, name))
        file, evaluation, again = self.evaluations[name]
        line: dict[str, Any] = {"step": following.plan.step_of(tokens), "tokens": tokens}
        line |= {"evaluation": name, "weights": mark}
        try:
            (model,) = resolve([str(path)], following.scratch)
            (outcome,) = evaluate(name, file, evaluation, [model], following.results, again, self.console)
            write_results(outcome, file.evaluation)
            if outcome.scores is None:
                cell, said = next(iter(outcome.failed.items()))
                line["failed"] = f"{cell}: {said}"
            else:
                line["scores"] = numbers(outcome.scores)
        except (ConfigError, RunError, OSError) as error:
            line["failed"] = str(error)
        self.fine = self.fine and "scores" in line
        append_line(following.lines, line)
        sync(following.lines)
