"""Arms compared with the baseline.

Over seeds, per arm: the difference of the final held-out losses, arm less baseline, in nats (smaller is better), with
Student's t interval and test over pairs of one seed (scipy.stats.ttest_rel), or Welch's where the two did not see the
same batches (ttest_ind without equal variances). P values of all arms are corrected by Holm (1979, "A simple
sequentially rejective multiple test procedure"). The verdict is that of the corrected p value at 0.05; the interval is
at 95 % for its comparison alone, so it can leave out zero where the verdict says that no difference is shown.

Where a run is missing there is no mean over the others: the comparison is incomplete, and still counts in its family.
So does an arm that a rule of the sweep stopped: with p = 1 for it, which is never smaller than the p value that it
would have had, Holm's bound holds for the survivors whatever they were chosen by.
Within one seed, `documents` tells how sure the difference of two trained models is over texts; it says nothing about
another seed, and no verdict uses it.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from data.keyed import keyed_generator
from sweeps.power import ALPHA, visible
from sweeps.results import DocumentLosses, RunResult, State, SweepResult

Verdict = Literal["better", "worse", "no difference shown", "incomplete", "stopped", "one seed", "not tested"]
"""stopped: by a rule of the sweep, at a rung. not tested: the difference is the same for every seed, so that seeds say
nothing about noise."""
Floats = NDArray[np.float64]
_VERDICTS: Mapping[int, Verdict] = {-1: "better", 0: "no difference shown", 1: "worse"}
_SAME = 1e-12  # of the values: differences this close to one another differ by rounding
_RESAMPLES = 2000
DOCUMENTS = "held-out documents"
"""What loss `final_losses` has found."""
OTHER_TEXT = "other held-out text"
"""Why an arm of `other_text` has no loss that could be compared."""


@dataclass(frozen=True)
class DocumentDifference:
    """Two runs of one seed over held-out documents: ratio of sums, 95 % percentile interval of a bootstrap."""

    seed: int
    difference: float
    low: float
    high: float
    documents: int


@dataclass(frozen=True)
class Comparison:
    """An arm with the baseline."""

    arm: str
    verdict: Verdict
    missing: Sequence[tuple[str, int, str]] = ()
    """(arm, seed, why) of each cell without a value."""
    paired: bool = True
    differences: Mapping[int, float] | None = None
    """By seed; None where a cell is missing."""
    mean: float | None = None
    """Of the difference; like all below None where a cell is missing."""
    low: float | None = None
    high: float | None = None
    deviation: float | None = None
    """Of the difference over seeds; of two unpaired arms the root of the sum of their variances."""
    p: float | None = None
    corrected: float | None = None
    """By Holm."""
    visible: float | None = None
    """The difference that this noise and these seeds would have shown with a probability of 80 %."""


Values = Mapping[tuple[str, int], float | None]


class Tested(NamedTuple):
    """Of differences over seeds: one number each, or an array with one for each comparison."""

    mean: Floats
    deviation: Floats
    """Over seeds; of two unpaired arms the root of the sum of their variances."""
    low: Floats
    high: Floats
    """Of the 95 % interval; nan where there is none."""
    p: Floats
    """1 where ours and theirs are equal for every seed; nan where every seed gives the same difference otherwise, so
    that seeds say nothing about noise."""
    freedom: Floats


def over_seeds(ours: Floats, theirs: Floats, paired: bool) -> Tested:
    """Each (..., seeds), 2 seeds or more; they may broadcast. Any number of comparisons costs one call of scipy."""
    ours, theirs = np.broadcast_arrays(np.asarray(ours, np.float64), np.asarray(theirs, np.float64))
    differences = ours - theirs
    rounding = _SAME * np.maximum(np.abs(ours), np.abs(theirs)).max(-1)
    if paired:
        constant = np.ptp(differences, axis=-1) <= rounding
    else:
        constant = np.maximum(np.ptp(ours, axis=-1), np.ptp(theirs, axis=-1)) <= rounding
    equal = constant & (~differences.any(-1) if paired else differences.mean(-1) == 0)
    # scipy warns of what has no variance: there it gets something else, and what it says of that is not used.
    first, second = (
        np.where(constant[..., None], rise * np.arange(ours.shape[-1]), side) for rise, side in ((1, ours), (2, theirs))
    )
    test: Any = (
        stats.ttest_rel(first, second, axis=-1) if paired else stats.ttest_ind(first, second, axis=-1, equal_var=False)
    )
    interval = test.confidence_interval(0.95)
    spread = differences.var(-1, ddof=1) if paired else ours.var(-1, ddof=1) + theirs.var(-1, ddof=1)
    ends = np.where(equal & paired, 0.0, np.nan)
    return Tested(
        differences.mean(-1),
        np.where(constant, 0.0, np.sqrt(spread)),
        np.where(constant, ends, interval.low),
        np.where(constant, ends, interval.high),
        np.where(constant, np.where(equal, 1.0, np.nan), test.pvalue),
        np.broadcast_to(test.df, constant.shape),
    )


def holm(values: Floats) -> Floats:
    """P values (..., k) corrected for their number: the i-th smallest of k times k - i + 1, never below the one
    before. nan, of what was not tested, counts as 1."""
    values = np.where(np.isnan(values), 1.0, values)
    order = np.argsort(values, axis=-1, kind="stable")
    factors = np.arange(values.shape[-1], 0, -1)
    sorted_ = np.minimum(np.take_along_axis(values, order, -1) * factors, 1.0)
    corrected = np.empty_like(sorted_)
    np.put_along_axis(corrected, order, np.maximum.accumulate(sorted_, -1), -1)
    return corrected


def called(corrected: Floats, mean: Floats) -> NDArray[np.int64]:
    """-1: better, 1: worse, 0: no difference shown. By the corrected p values and the signs of the differences."""
    return np.where(corrected <= ALPHA, np.sign(mean), 0).astype(np.int64)


def compare(
    values: Values,
    arms: Sequence[str],
    baseline: str,
    seeds: Sequence[int],
    paired: Mapping[tuple[str, int], bool],
    why: Mapping[tuple[str, int], str] | None = None,
    stopped: Collection[str] = (),
) -> list[Comparison]:
    """Every arm but the baseline. values: smaller is better; None for a cell without one. why: what is wrong there.
    A value that is not finite is missing. stopped: arms that are in the family and compared with nothing."""
    infinite = {cell for cell, value in values.items() if value is not None and not math.isfinite(value)}
    values = {cell: None if cell in infinite else value for cell, value in values.items()}
    why = {**(why or {}), **dict.fromkeys(infinite, "not finite")}
    others = [arm for arm in arms if arm != baseline]
    found = [_compare(values, arm, baseline, seeds, paired, len(others), why) for arm in others]
    found = [Comparison(each.arm, "stopped", each.missing) if each.arm in stopped else each for each in found]
    corrected = holm(np.array([math.nan if each.p is None else each.p for each in found]))
    judged = []
    for each, adjusted in zip(found, corrected.tolist(), strict=True):
        if each.p is None or each.mean is None:
            judged.append(each)
            continue
        verdict = _VERDICTS[int(called(np.array(adjusted), np.array(each.mean)))]
        judged.append(replace(each, corrected=adjusted, verdict=verdict))
    return judged


def _compare(
    values: Values,
    arm: str,
    baseline: str,
    seeds: Sequence[int],
    paired: Mapping[tuple[str, int], bool],
    comparisons: int,
    why: Mapping[tuple[str, int], str],
) -> Comparison:
    pairs = all(paired.get((arm, seed), False) for seed in seeds)
    cells = [(name, seed) for name in (arm, baseline) for seed in seeds]
    missing = [(*cell, why.get(cell, "missing")) for cell in cells if values.get(cell) is None]
    if missing or not seeds:
        return Comparison(arm, "incomplete", missing, pairs)
    ours, theirs = (np.array([values[name, seed] for seed in seeds], np.float64) for name in (arm, baseline))
    differences = ours - theirs
    facts = Comparison(
        arm,
        "one seed",
        paired=pairs,
        differences=dict(zip(seeds, differences.tolist(), strict=True)),
        mean=float(differences.mean()),
    )
    if len(seeds) < 2:
        return facts
    test = over_seeds(ours, theirs, pairs)
    deviation, p = float(test.deviation), _known(test.p)
    facts = replace(facts, deviation=deviation, low=_known(test.low), high=_known(test.high), p=p)
    if p is None:
        return replace(facts, verdict="not tested")
    if deviation == 0:
        return replace(facts, verdict="no difference shown")
    smallest = visible(deviation / math.sqrt(len(seeds)), float(test.freedom), comparisons)
    return replace(facts, verdict="no difference shown", visible=smallest)


def _known(value: Floats) -> float | None:
    return None if np.isnan(value) else float(value)


def final_losses(sweep: SweepResult) -> tuple[dict[tuple[str, int], float | None], str]:
    """By cell the held-out loss of the final weights, None of a run that is not finished, perhaps not finite; and what
    loss that is.

    The loss over documents, whose masks are the same for every arm, where all finished runs have it; else that of the
    run's own last evaluation.
    """
    finished = {cell: run for cell, run in sweep.runs.items() if run.state == "finished"}
    values: dict[tuple[str, int], float | None] = dict.fromkeys(
        (arm.name, seed) for arm in sweep.arms for seed in sweep.seeds
    )
    if finished and _one_text(sweep, finished):
        found = {cell: run.documents.loss for cell, run in finished.items() if run.documents is not None}
        return values | found, DOCUMENTS
    found = {cell: run.summary.get("validation", {}).get("loss") for cell, run in finished.items()}
    return values | found, "the last evaluation of each run"


def other_text(sweep: SweepResult) -> list[str]:
    """Arms whose last evaluation, in some seed, had another number of masked tokens than the baseline's: rows of
    another length, or another masking, make losses that are not of the same text."""

    def masked(arm: str, seed: int) -> int | None:
        run = sweep.runs[arm, seed]
        return run.summary.get("validation", {}).get("masked_tokens") if run.state == "finished" else None

    found = []
    for arm in sweep.arms:
        pairs = [(masked(arm.name, seed), masked(sweep.baseline, seed)) for seed in sweep.seeds]
        if any(ours != theirs for ours, theirs in pairs if ours is not None and theirs is not None):
            found.append(arm.name)
    return found


def _one_text(sweep: SweepResult, finished: Mapping[tuple[str, int], RunResult]) -> bool:
    """Whether all runs of a seed have lost on the same masked tokens of the same documents."""
    for seed in sweep.seeds:
        texts = [run.documents for (_, of), run in finished.items() if of == seed]
        first = texts[0] if texts else None
        for each in texts:
            if each is None or first is None or aligned(each, first) is None:
                return False
    return True


def aligned(ours: DocumentLosses, theirs: DocumentLosses) -> np.ndarray | None:
    """Where our documents lie in theirs; None when these are others, or masked otherwise."""
    places = {name: place for place, name in enumerate(theirs.documents)}
    if len(places) != len(ours.documents) or any(name not in places for name in ours.documents):
        return None
    order = np.array([places[name] for name in ours.documents], np.int64)
    return order if np.array_equal(ours.counts, theirs.counts[order]) else None


def documents(ours: RunResult, theirs: RunResult) -> DocumentDifference | None:
    """Within one seed; None where one has no losses by document, or they are of other masked tokens."""
    if ours.documents is None or theirs.documents is None:
        return None
    order = aligned(ours.documents, theirs.documents)
    total = int(ours.documents.counts.sum())
    if order is None or not total or len(order) < 2:
        return None
    gaps, counts = ours.documents.sums - theirs.documents.sums[order], ours.documents.counts
    found = float(gaps.sum() / total)
    low = high = found
    if np.ptp(gaps) > 0 or np.ptp(counts) > 0:
        result = stats.bootstrap(
            (gaps, counts),
            lambda gap, count, axis: gap.sum(axis) / np.maximum(count.sum(axis), 1),
            paired=True,
            vectorized=True,
            n_resamples=_RESAMPLES,
            batch=max(1, 4_000_000 // len(order)),
            method="percentile",
            rng=keyed_generator(ours.seed, f"documents/{ours.arm}"),
        )
        low, high = float(result.confidence_interval.low), float(result.confidence_interval.high)
    return DocumentDifference(ours.seed, found, low, high, len(order))


def why_missing(sweep: SweepResult) -> dict[tuple[str, int], str]:
    """What to say of cells without a final loss."""
    said: dict[State, str] = {"finished": "finished without a held-out loss"}
    found = {cell: said.get(run.state, run.state) for cell, run in sweep.runs.items()}
    return found | {(arm, seed): f"stopped at {sweep.at(arm)}" for arm in sweep.stopped for seed in sweep.seeds}


def compare_in(sweep: SweepResult, values: Values, why: Mapping[tuple[str, int], str]) -> list[Comparison]:
    """`compare` of a sweep's arms."""
    arms = [arm.name for arm in sweep.arms]
    return compare(values, arms, sweep.baseline, sweep.seeds, sweep.paired, why, sweep.stopped)


def verdicts(sweep: SweepResult) -> list[Comparison]:
    """Of the final held-out loss."""
    return compare_in(sweep, final_losses(sweep)[0], why_missing(sweep))
