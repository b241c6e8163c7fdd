"""What a sweep, or a run by itself, has to say: plain values that statistics and the report page read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

State = Literal["missing", "waiting", "running", "interrupted", "failed", "paused", "stopped", "finished"]
"""missing: not begun. interrupted: a signal or a failure ended it, as its log says. failed: it diverged, or its
checkpoints are gone. paused: at a rung, until other arms have come there. stopped: by a rule of the sweep, so its loss
is not a final one."""


@dataclass(frozen=True)
class DocumentLosses:
    """Held-out loss of a run's final weights, document by document, under masks that are the same for every arm."""

    documents: Sequence[str]
    """Names, unique: STREAM/NUMBER."""
    sums: np.ndarray
    """(documents,) float64: cross entropy summed over a document's masked tokens, in nats."""
    counts: np.ndarray
    """(documents,) int64: its masked tokens."""

    @property
    def loss(self) -> float:
        """Mean over all masked tokens."""
        return float(self.sums.sum() / self.counts.sum())


@dataclass(frozen=True)
class RunResult:
    """One run: an arm with a seed, or a run by itself."""

    folder: Path
    arm: str
    seed: int
    state: State
    config: Mapping[str, Any]
    """The resolved run file, as the run recorded it; empty of one that has not begun."""
    lines: Sequence[Mapping[str, Any]]
    """Of metrics.jsonl, whole and in order."""
    summary: Mapping[str, Any]
    """summary.json; empty before the run's end."""
    documents: DocumentLosses | None = None
    scores: Sequence[Mapping[str, Any]] = ()
    """Lines of evaluations.jsonl: step, tokens, evaluation, scores."""


@dataclass(frozen=True)
class Arm:
    """One variant."""

    name: str
    changes: Mapping[str, Any]
    """Config paths that differ from the baseline by intention, with their values."""
    adjusted: Mapping[str, Any] = field(default_factory=dict)
    """Config paths that `equal` has adjusted, with their values."""
    parameters: int | None = None
    flops_per_token: float | None = None
    notes: Sequence[str] = ()
    """Such as: not paired with the baseline, since rows are longer."""


@dataclass(frozen=True)
class Judged:
    """Whether an arm goes on after a rung. Rungs count from 1."""

    arm: str
    rung: int
    losses: Mapping[int, float | None]
    """Held-out, by seed; None: not finite."""
    kept: bool


@dataclass(frozen=True)
class Stops:
    """Where a sweep stops arms, and what was decided so far."""

    rungs: Sequence[float]
    """Shares of the budget."""
    tokens: Mapping[str, Sequence[int]]
    """By arm, of each rung."""
    judged: Sequence[Judged] = ()


@dataclass(frozen=True)
class Trial:
    """An arm that a search has proposed, trained once, with the search's own seed."""

    number: int
    params: Mapping[str, Any]
    """As the search knows them."""
    changes: Mapping[str, Any]
    """Config paths and their values."""
    state: Literal["running", "finished", "failed"] = "running"
    loss: float | None = None
    """Held-out, of the final weights; None unless it is finished."""
    chosen: bool = False
    """Whether it was the best when the search had ended: an arm of the sweep since then."""
    why: str = ""
    """Of one that failed."""
    died_at: tuple[int, ...] = ()
    """Tokens of its run's newest checkpoint whenever the run had ended otherwise than by diverging or on demand."""


@dataclass(frozen=True)
class SearchResult:
    """A search as it stands."""

    wanted: int
    """Trials in all."""
    seed: int
    """Of its runs."""
    trials: Sequence[Trial]


@dataclass(frozen=True)
class SweepResult:
    """A sweep as it stands."""

    name: str
    folder: Path
    baseline: str
    arms: Sequence[Arm]
    """The baseline among them, in the file's order."""
    seeds: Sequence[int]
    runs: Mapping[tuple[str, int], RunResult]
    """By arm and seed; every cell is there, begun or not."""
    paired: Mapping[tuple[str, int], bool] = field(default_factory=dict)
    """Whether the ledgers prove that this cell saw the baseline's batches of that seed, with its masks."""
    stops: Stops | None = None
    search: SearchResult | None = None

    @property
    def stopped(self) -> dict[str, int]:
        """The rung at which an arm was stopped. Arms that were trained to their end all the same are none."""
        return {
            each.arm: each.rung
            for each in (self.stops.judged if self.stops else ())
            if not each.kept and any(self.runs[each.arm, seed].state == "stopped" for seed in self.seeds)
        }

    def at(self, arm: str) -> str:
        """Of a stopped arm, where: `rung 1, 25 % of its budget`."""
        assert self.stops is not None
        rung = self.stopped[arm]
        return f"rung {rung}, {self.stops.rungs[rung - 1]:.3g} of its budget"
