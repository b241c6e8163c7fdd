"""Arms at equal tokens, FLOPs and hours, and what they spend to reach the baseline's loss."""

import statistics as plain
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sweeps.curves import AXES, Axis, Curve, held_out
from sweeps.results import SweepResult
from sweeps.statistics import OTHER_TEXT, Comparison, compare_in, other_text, why_missing


@dataclass(frozen=True)
class AtEqual:
    """The loss of every arm where all have spent as much."""

    axis: Axis
    budget: float | None
    """The smallest of what the finished runs have spent; None where that is not known of all."""
    losses: Mapping[tuple[str, int], float | None]
    shares: Mapping[str, float]
    """The budget as a share of what an arm had spent by its own end, mean over its finished runs; before that end its
    learning rate has not decayed. Of arms of which it is known."""
    comparisons: Sequence[Comparison]


@dataclass(frozen=True)
class Reaching:
    """What an arm had spent at the final loss of the baseline of the same seed, as a share of what the baseline had."""

    arm: str
    axis: Axis
    reached: int
    """Of `seeds` runs."""
    seeds: int
    share: float | None
    """Mean over seeds; None unless all have reached it."""
    why: str = ""
    """Why the arm cannot be compared."""


def at_equal(sweep: SweepResult) -> list[AtEqual]:
    """For each cost a family of comparisons of its own. Runs that are not finished make theirs incomplete, and so does
    other held-out text: the losses are those of evaluations under way, whatever final loss the verdicts are of."""
    curves = _curves(sweep)
    others = other_text(sweep)
    why = why_missing(sweep)
    arms = [arm.name for arm in sweep.arms]
    found = []
    for axis in AXES:
        ends = [curve.end(axis) for curve in curves.values()]
        known = [end for end in ends if end is not None]
        budget = min(known) if known and len(known) == len(ends) else None
        losses = {
            (arm, seed): curves[arm, seed].at(axis, budget)
            if budget is not None and (arm, seed) in curves and arm not in others
            else None
            for arm in arms
            for seed in sweep.seeds
        }
        reasons = {cell: "no evaluation before that" if cell in curves else why.get(cell, "missing") for cell in losses}
        reasons |= {cell: OTHER_TEXT for cell in curves if cell[0] in others}
        shares = {arm: budget / plain.fmean(own) for arm in arms if budget and (own := _ends(curves, arm, axis))}
        found.append(AtEqual(axis, budget, losses, shares, compare_in(sweep, losses, reasons)))
    return found


def reaching(sweep: SweepResult) -> list[Reaching]:
    """Every arm but the baseline and those that were stopped, for each cost."""
    curves = _curves(sweep)
    others = other_text(sweep)
    found: list[Reaching] = []
    for arm in sweep.arms:
        if arm.name == sweep.baseline or arm.name in sweep.stopped:
            continue
        if arm.name in others:
            found += [Reaching(arm.name, axis, 0, len(sweep.seeds), None, OTHER_TEXT) for axis in AXES]
            continue
        for axis in AXES:
            shares = [
                share
                for seed in sweep.seeds
                if (share := _share(curves.get((arm.name, seed)), curves.get((sweep.baseline, seed)), axis)) is not None
            ]
            whole = bool(shares) and len(shares) == len(sweep.seeds)
            found.append(
                Reaching(arm.name, axis, len(shares), len(sweep.seeds), plain.fmean(shares) if whole else None)
            )
    return found


def _share(ours: Curve | None, theirs: Curve | None, axis: Axis) -> float | None:
    if ours is None or theirs is None or not len(theirs.values):
        return None
    spent, took = theirs.end(axis), ours.reaches(axis, float(theirs.values[-1]))
    return took / spent if took is not None and spent else None


def _ends(curves: Mapping[tuple[str, int], Curve], arm: str, axis: Axis) -> list[float]:
    ends = [curve.end(axis) for (name, _), curve in curves.items() if name == arm]
    return [end for end in ends if end is not None]


def _curves(sweep: SweepResult) -> dict[tuple[str, int], Curve]:
    return {cell: held_out(run) for cell, run in sweep.runs.items() if run.state == "finished"}
