"""Evaluates a run's checkpoints beside it, as its `evaluations` say: each once, also those of before a restart.

RUN/evaluations.jsonl has a line for each evaluation of a checkpoint: step, tokens, evaluation, and scores or failed.
RUN/pending/tokens-N is a checkpoint (hard links) that waits, so that retention cannot take it away. RUN/evaluations
holds the results as `main.py eval` writes them.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from evals.background import BackgroundConfig
from evals.config import build_eval, eval_files, load_eval_file, overrides_of
from evals.driver import evaluate
from evals.interface import Eval, EvalFile
from evals.models import resolve
from evals.results import numbers, write_results
from flexbert_core.durable import lock, new_folder, remove_folder
from flexbert_core.schema import ConfigError, RunError
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from training.checkpoints.files import checkpoint_name, list_checkpoints, tokens_of
from training.folder import RunFolder

_POLL_SECONDS = 1.0


def entries_of(config: RunConfig) -> list[BackgroundConfig]:
    """Entries of a run's `evaluations` that go on beside it."""
    return [entry for entry in config.evaluations if isinstance(entry, BackgroundConfig)]


class Following:
    """What is due of a run, and what is done."""

    def __init__(self, run: Path) -> None:
        """Raises ConfigError for what is no run folder, or one whose `evaluations` name nothing to do beside it."""
        self.folder = RunFolder(run)
        self.run = run
        self.config = self.folder.recorded_config()
        self.plan = PhasePlan(self.config)
        self.entries = entries_of(self.config)
        if not self.entries:
            raise ConfigError(f"{run}: its `evaluations` have no entry `eval`, so there is nothing to follow")
        self.names = {name: entry for entry in self.entries for name in eval_files(",".join(entry.files))}

    @property
    def lines(self) -> Path:
        return self.run / "evaluations.jsonl"

    @property
    def pending(self) -> Path:
        return self.run / "pending"

    def done(self) -> set[tuple[int, str]]:
        """(tokens, evaluation) of what has scores."""
        return {(line["tokens"], line["evaluation"]) for line in read_evaluations(self.run) if "scores" in line}

    def due(self, tokens: int) -> list[str]:
        """Evaluations to make of the checkpoint with these tokens."""
        step = self.plan.step_of(tokens)
        assert step is not None, f"{self.run}: no step ends at {tokens} tokens"
        milestone = self.plan.is_milestone(step)
        return [name for name, entry in self.names.items() if milestone or self.plan.crosses(step, entry.every)]

    def missing(self, tokens: int) -> list[str]:
        done = self.done()
        return [name for name in self.due(tokens) if (tokens, name) not in done]

    def pin(self, path: Path) -> None:
        """Let a checkpoint wait if it is due and not evaluated yet."""
        place = self.pending / path.name
        if place.exists() or not self.missing(tokens_of(path)):
            return
        with contextlib.suppress(FileNotFoundError), new_folder(place) as beside:  # retention may be faster
            for file in path.iterdir():
                os.link(file, beside / file.name)

    def pin_all(self) -> None:
        """All that are there."""
        for path in list_checkpoints(self.run / "checkpoints"):
            self.pin(path)

    def waiting(self) -> list[Path]:
        return list_checkpoints(self.pending)


def read_evaluations(run: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of evaluations.jsonl."""
    file = run / "evaluations.jsonl"
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def follow(run: Path, console: Console, watch: bool) -> bool:
    """Evaluate what waits; watch: until the run is finished, else once. Whether all went well.

    Raises ConfigError for what can never be evaluated, RunError when another process follows the run.
    """
    following = Following(run)
    made: dict[str, tuple[EvalFile, Eval, list[str]]] = {}
    for entry in following.entries:
        files = eval_files(",".join(entry.files))
        for name, file in files.items():
            overrides = overrides_of(name, list(files), entry.set)
            loaded = load_eval_file(file, overrides)
            made[name] = (loaded, build_eval(loaded.evaluation, name), [str(file), *overrides])
    tried: set[tuple[int, str]] = set()
    fine = True
    with lock(run / ".evaluations.lock", run, "evaluating its checkpoints"):
        while True:
            finished = following.folder.finished() is not None  # asked before: what it wrote last is seen
            if finished or not watch:  # else the training process does
                following.pin_all()
            busy = False
            for path in following.waiting():
                tokens = tokens_of(path)
                todo = [name for name in following.missing(tokens) if (tokens, name) not in tried]
                for name in todo:
                    tried.add((tokens, name))
                    fine = _evaluate(following, path, name, *made[name], console) and fine
                    busy = True
                if not [name for name in following.missing(tokens) if (tokens, name) not in tried]:
                    remove_folder(path)
            if busy:
                continue
            if finished or not watch:
                return fine
            time.sleep(_POLL_SECONDS)


def _evaluate(
    following: Following,
    path: Path,
    name: str,
    file: EvalFile,
    evaluation: Eval,
    again: list[str],
    console: Console,
) -> bool:
    tokens, output = tokens_of(path), following.run / "evaluations"
    line: dict[str, Any] = {"step": following.plan.step_of(tokens), "tokens": tokens, "evaluation": name}
    try:
        (model,) = resolve([str(path)], output / ".models")
        (outcome,) = evaluate(name, file, evaluation, [model], output, again, console)
        write_results(outcome, file.evaluation)
        if outcome.scores is None:
            cell, said = next(iter(outcome.failed.items()))
            line["failed"] = f"{cell}: {said}"
        else:
            line["scores"] = numbers(outcome.scores)
    except (ConfigError, RunError) as error:
        line["failed"] = str(error)
    finally:
        shutil.rmtree(output / ".models", ignore_errors=True)
    with following.lines.open("a") as out:
        out.write(json.dumps(line) + "\n")
        out.flush()
        os.fsync(out.fileno())
    return "scores" in line


def left_to_do(run: Path) -> list[str]:
    """`evaluation of tokens-N` for all that is due of a run's checkpoints and has no scores."""
    following = Following(run)
    paths = {tokens_of(path) for path in (*list_checkpoints(run / "checkpoints"), *following.waiting())}
    return [f"{name} of {checkpoint_name(tokens)}" for tokens in sorted(paths) for name in following.missing(tokens)]
