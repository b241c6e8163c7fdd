"""Which checkpoints of a run its entries `eval` evaluate, which of them wait, and what has scores.

Each entry has a TITLE, the names of its evaluations. RUN/pending-TITLE/tokens-N is a checkpoint (hard links) that waits
for it, so that retention cannot take it away. RUN/evaluations.jsonl has a line for each evaluation of a checkpoint:
step, tokens, evaluation, the mark of its weights, and scores or failed.

A run that goes back to an older checkpoint trains other weights for the same number of tokens. The mark tells them
apart: scores count for the weights that they were made of, and for no others.
"""

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evals.background_config import BackgroundConfig
from evals.config import eval_files, load_eval_file, overrides_of
from evals.interface import EvalFile
from flexbert_core.durable import new_folder, remove_folder
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from training.checkpoints.files import MANIFEST, checkpoint_name, list_checkpoints, tokens_of
from training.folder import RunFolder

log = logging.getLogger(__name__)
_LONGEST_TITLE = 100  # letters: it is part of the names of files


class Following:
    """One entry of a run: what is due, what waits, what is done."""

    def __init__(self, run: Path, config: RunConfig, entry: BackgroundConfig) -> None:
        """run: runs/NAME, which need not be there yet. Raises ConfigError for evaluations that are none."""
        self.run, self.entry, self.plan = run, entry, PhasePlan(config)
        self.files = eval_files(",".join(entry.files))
        # No name of an evaluation holds a comma, so two entries never have one title.
        names = ",".join(self.files)
        self.title = names if len(names) <= _LONGEST_TITLE else f"{next(iter(self.files))},and-{len(self.files) - 1}"
        self.lines = run / "evaluations.jsonl"
        self.pending = run / f"pending-{self.title}"
        self.log = run / f"evaluations-{self.title}.log"
        self.lock = run / f".{self.title}.lock"
        self.results = run / "evaluations"
        self.scratch = self.results / f".models-{self.title}"

    def load(self) -> dict[str, tuple[EvalFile, list[str]]]:
        """What each evaluation's file says, and a command line's arguments that say it again. Raises ConfigError."""
        loaded = {}
        for name, file in self.files.items():
            overrides = overrides_of(name, list(self.files), self.entry.set)
            loaded[name] = load_eval_file(file, overrides), [str(file), *overrides]
        return loaded

    def missing(self, path: Path) -> list[str]:
        """Evaluations of a checkpoint that are due and have no scores of its weights."""
        step = self.plan.step_of(tokens_of(path))  # None: of other batch sizes than the run has now
        if step is None or not (self.plan.is_milestone(step) or self.plan.crosses(step, self.entry.every)):
            return []
        mark = mark_of(path)
        lines = [line for line in read_evaluations(self.run) if "scores" in line and line["tokens"] == tokens_of(path)]
        done = {line["evaluation"] for line in lines if mark is not None and line.get("weights") == mark}
        return [name for name in self.files if name not in done]

    def pin(self, path: Path) -> None:
        """Let a checkpoint wait if evaluations of it are missing, in place of one of other weights. Raises OSError."""
        place = self.pending / path.name
        if not self.missing(path) or (place.exists() and mark_of(place) == mark_of(path)):
            return
        with contextlib.suppress(FileNotFoundError), new_folder(place) as beside:  # retention may be faster
            for file in path.iterdir():
                os.link(file, beside / file.name)

    def pin_all(self, up_to: float = math.inf) -> None:
        """Let all that are there wait. up_to: tokens; later ones wait no more: the run went back, and gave them up."""
        for path in self.waiting():
            if tokens_of(path) > up_to:
                remove_folder(path)
        for path in list_checkpoints(self.run / "checkpoints"):
            if tokens_of(path) <= up_to:
                self.pin(path)

    def waiting(self) -> list[Path]:
        return list_checkpoints(self.pending)


def entries_of(config: RunConfig) -> list[BackgroundConfig]:
    """Entries of a run's `evaluations` that go on beside it."""
    return [entry for entry in config.evaluations if isinstance(entry, BackgroundConfig)]


def followings(run: Path, config: RunConfig) -> list[Following]:
    """One for each entry. Raises ConfigError for evaluations that are none, or that two entries name: their results
    would lie in one place."""
    found = [Following(run, config, entry) for entry in entries_of(config)]
    names = [name for each in found for name in each.files]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"evaluations: {name!r} is named by two entries `eval`: leave it out of one, or give that one a copy "
                "of its file under another name"
            )
    return found


def following_of(run: Path) -> list[Following]:
    """Those of a run as it was last started. Raises ConfigError for what is no run folder, or has nothing to follow."""
    found = followings(run, RunFolder(run).recorded_config())
    if not found:
        raise ConfigError(f"{run}: its `evaluations` have no entry `eval`, so there is nothing to follow")
    return found


def adopt(run: Path, everyone: Sequence[Following], up_to: float = math.inf) -> None:
    """Give checkpoints that wait for entries which the run has no more to those that it has, where they are due; nobody
    would take the others away. everyone: all of the run. up_to: tokens, as in `pin_all`."""
    for folder in set(run.glob("pending*")) - {each.pending for each in everyone}:
        for path in list_checkpoints(folder):
            for each in everyone if tokens_of(path) <= up_to else ():
                if not (each.pending / path.name).exists():
                    each.pin(path)
        shutil.rmtree(folder, ignore_errors=True)


def mark_of(path: Path) -> str | None:
    """The hash of a checkpoint's weights, as its manifest has it; None where that is damaged or gone."""
    try:
        return json.loads((path / MANIFEST).read_text())["files"]["model.safetensors"]["xxh3_64"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_evaluations(run: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of evaluations.jsonl."""
    file = run / "evaluations.jsonl"
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        try:
            node = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        if isinstance(node, dict) and node.keys() >= {"step", "tokens", "evaluation"}:
            yield node


def left_to_do(run: Path) -> list[str]:
    """`evaluation of tokens-N` for all that is due of a run's checkpoints and has no scores."""
    left = set[tuple[int, str]]()
    for each in following_of(run):
        for path in (*list_checkpoints(run / "checkpoints"), *each.waiting()):
            left |= {(tokens_of(path), name) for name in each.missing(path)}
    return [f"{name} of {checkpoint_name(tokens)}" for tokens, name in sorted(left)]
