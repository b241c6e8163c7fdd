"""Comparisons over seeds and over documents: against scipy and plain arithmetic, and where there is nothing to compare."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.synthetic_sweep import write_sweep
from data.keyed import keyed_generator
from sweeps.budgets import at_equal, reaching
from sweeps.results import DocumentLosses, RunResult
from sweeps.statistics import Comparison, compare, documents, final_losses, holm, over_seeds, verdicts

SEEDS = [1, 2, 3, 4]


def one(ours: list[float | None], theirs: list[float | None], paired: bool = True, others: int = 0) -> Comparison:
    """`ours` with a baseline. others: more arms, equal to the baseline."""
    arms = ["base", "arm", *(f"more{place}" for place in range(others))]
    values: dict[tuple[str, int], float | None] = {}
    for arm in arms:
        column = ours if arm == "arm" else theirs
        values |= {(arm, seed): value for seed, value in zip(SEEDS, column, strict=False)}
    seeds = SEEDS[: len(ours)]
    return compare(values, arms, "base", seeds, {(arm, seed): paired for arm in arms for seed in seeds})[0]


def test_a_paired_comparison_is_the_t_test() -> None:
    ours, theirs = [2.10, 2.14, 2.05, 2.11], [2.12, 2.15, 2.08, 2.14]
    found = one(list(ours), list(theirs))
    gaps = np.array(ours) - np.array(theirs)
    half = stats.t.isf(0.025, 3) * gaps.std(ddof=1) / 2
    assert found.mean == pytest.approx(gaps.mean())
    assert (found.low, found.high) == pytest.approx((gaps.mean() - half, gaps.mean() + half))
    test: Any = stats.ttest_1samp(gaps, 0)
    assert found.p == pytest.approx(test.pvalue)
    assert found.verdict == "better"
    assert one(list(theirs), list(ours)).verdict == "worse"
    assert found.differences == pytest.approx(dict(zip(SEEDS, gaps, strict=True)))


def test_what_is_not_paired_is_welch() -> None:
    ours, theirs = [2.10, 2.14, 2.05, 2.11], [2.12, 2.15, 2.08, 2.14]
    found = one(list(ours), list(theirs), paired=False)
    test: Any = stats.ttest_ind(ours, theirs, equal_var=False)
    assert found.p == pytest.approx(test.pvalue)
    assert found.verdict == "no difference shown"
    assert found.visible is not None
    assert found.visible > 0.05


def test_one_pair_unproven_makes_the_comparison_unpaired() -> None:
    values = {(arm, seed): 2.0 + seed + (arm == "arm") / 10 for arm in ("base", "arm") for seed in SEEDS}
    (found,) = compare(values, ["base", "arm"], "base", SEEDS, {("arm", seed): seed != 3 for seed in SEEDS})
    assert not found.paired


def test_a_missing_cell_is_never_averaged_over() -> None:
    for ours, theirs in (([2.1, None, 2.0], [2.2, 2.2, 2.1]), ([2.1, 2.1, 2.0], [2.2, None, 2.1])):
        found = one(list(ours), list(theirs))
        assert found.verdict == "incomplete"
        assert (found.mean, found.low, found.p, found.differences) == (None, None, None, None)
        assert [seed for _, seed, _ in found.missing] == [2]


def test_what_is_not_finite_is_a_missing_cell() -> None:
    for wrong in (float("nan"), float("inf")):
        found = one([2.1, wrong, 2.0], [2.2, 2.2, 2.1])
        assert (found.verdict, found.missing) == ("incomplete", [("arm", 2, "not finite")])


def test_an_incomplete_arm_still_counts_in_its_family() -> None:
    """Else finishing it could take a verdict away from another arm."""
    gap = [-0.010, -0.013, -0.008, -0.012]
    values: dict[tuple[str, int], float | None] = {("base", seed): 2.0 for seed in SEEDS}
    values |= {("arm", seed): 2.0 + each for seed, each in zip(SEEDS, gap, strict=True)}
    values |= {("gone", seed): None for seed in SEEDS}
    first, _ = compare(values, ["base", "arm", "gone"], "base", SEEDS, {(a, s): True for a, s in values})
    assert first.p is not None
    assert first.corrected == pytest.approx(2 * first.p)


def test_one_seed_gives_no_verdict() -> None:
    found = one([2.0], [2.5])
    assert (found.verdict, found.mean, found.p, found.low) == ("one seed", -0.5, None, None)


def test_identical_arms_and_constant_differences() -> None:
    same = one([2.0, 2.1, 2.2], [2.0, 2.1, 2.2])
    assert (same.verdict, same.p, same.mean, same.low, same.high) == ("no difference shown", 1.0, 0.0, 0.0, 0.0)
    constant = one([2.1, 2.2, 2.3], [2.0, 2.1, 2.2])  # 0.1 up to rounding: no noise to hold it against
    assert (constant.verdict, constant.p, constant.low) == ("not tested", None, None)
    assert constant.mean == pytest.approx(0.1)
    flat = one([2.0, 2.0, 2.0], [1.0, 1.0, 1.0], paired=False)
    assert flat.verdict == "not tested"
    assert one([2.0, 2.0, 2.0], [2.0, 2.0, 2.0], paired=False).verdict == "no difference shown"


def test_holm() -> None:
    """By hand: 0.01 * 4; 0.02 * 3; then 0.03 * 2 and 0.04 * 1, the latter not below the one before."""
    assert holm(np.array([0.03, 0.01, 0.04, 0.02])) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]
    assert holm(np.array([0.02, np.nan])).tolist() == [0.04, 1.0]
    assert holm(np.array([])).tolist() == []


def test_many_comparisons_at_once_are_each_by_itself() -> None:
    """Some of them constant, some equal: against scipy, one after the other."""
    rng = keyed_generator(1, "many")
    ours, theirs = rng.normal(2, 0.1, (2, 7, 3, 4))
    ours[0, 0], ours[1, 1] = theirs[0, 0], theirs[1, 1] + 0.25
    found = over_seeds(ours, theirs, paired=True)
    corrected = holm(found.p)
    for place in np.ndindex(7, 3):
        test: Any = stats.ttest_rel(ours[place], theirs[place]) if place not in ((0, 0), (1, 1)) else None
        if test is not None:
            assert found.p[place] == pytest.approx(test.pvalue)
            assert (found.low[place], found.high[place]) == pytest.approx(tuple(test.confidence_interval(0.95)))
        assert corrected[place[0]] == pytest.approx(holm(found.p[place[0]]))
    assert (found.p[0, 0], found.low[0, 0]) == (1.0, 0.0)
    assert np.isnan([found.p[1, 1], found.low[1, 1]]).all()
    apart = over_seeds(ours, theirs, paired=False)
    test = stats.ttest_ind(ours[2, 1], theirs[2, 1], equal_var=False)
    assert (apart.p[2, 1], apart.freedom[2, 1]) == pytest.approx((test.pvalue, test.df))


def run_with(sums: Any, counts: Any, names: list[str] | None = None, seed: int = 1) -> RunResult:
    names = names or [str(place) for place in range(len(sums))]
    losses = DocumentLosses(names, np.asarray(sums, np.float64), np.asarray(counts, np.int64))
    return RunResult(Path("x"), "arm", seed, "finished", {}, [], {}, losses)


def test_the_interval_over_documents_covers_the_truth() -> None:
    """95 % intervals of a ratio of sums cover it in 150 of 160 draws or so: at least 140 (p < 0.002)."""
    covered = 0
    for number in range(160):
        rng = keyed_generator(3, "documents", number)
        counts = rng.integers(5, 100, 150)
        gaps = rng.normal(0.01, 0.05, 150) * counts
        found = documents(run_with(5.0 * counts + gaps, counts, seed=number), run_with(5.0 * counts, counts))
        assert found is not None
        assert found.difference == pytest.approx(gaps.sum() / counts.sum())
        covered += found.low <= 0.01 <= found.high
    assert covered >= 140


def test_documents_are_matched_by_name() -> None:
    ours = run_with([1.0, 2.0, 3.0], [1, 2, 3], ["a", "b", "c"])
    shuffled = run_with([3.5, 1.5, 2.5], [3, 1, 2], ["c", "a", "b"])
    found = documents(ours, shuffled)
    assert found is not None
    assert found.difference == pytest.approx(-1.5 / 6)
    assert documents(ours, run_with([1.0, 2.0, 3.0], [1, 2, 4], ["a", "b", "c"])) is None  # masked otherwise
    assert documents(ours, run_with([1.0, 2.0, 3.0], [1, 2, 3], ["a", "b", "d"])) is None
    equal = documents(ours, ours)
    assert equal is not None
    assert (equal.difference, equal.low, equal.high) == (0.0, 0.0, 0.0)


def test_planted_arms_of_a_sweep(tmp_path: Path) -> None:
    """The noise of a paired difference is 0.003 nats: arms 0.03 apart are told apart, and one like the baseline is not."""
    sweep = write_sweep(tmp_path, {"base": 0.0, "good": -0.03, "bad": 0.03, "same": 0.0}, range(5), lines=40)
    assert [each.verdict for each in verdicts(sweep)] == ["better", "worse", "no difference shown"]
    assert final_losses(sweep)[1] == "held-out documents"


def test_a_run_that_stops_makes_only_its_comparison_incomplete(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": 0.0, "a": -0.03, "b": 0.03}, range(4), 40, unfinished=[("b", 2)])
    first, second = verdicts(sweep)
    assert (first.verdict, second.verdict) == ("better", "incomplete")
    assert second.missing == [("b", 2, "interrupted")]
    tokens, *others = at_equal(sweep)
    assert [one.verdict for one in tokens.comparisons] == ["better", "incomplete"]
    assert [each.comparisons[1].verdict for each in others] == ["incomplete", "incomplete"]


def test_costs(tmp_path: Path) -> None:
    """Arm b's tokens cost 5 % more each, so that at equal FLOPs it has seen fewer."""
    sweep = write_sweep(tmp_path, {"base": 0.0, "b": 0.0}, range(3), lines=100)
    tokens, flops, hours = at_equal(sweep)
    assert tokens.budget == 100e6
    assert flops.budget == pytest.approx(1.3e8 * 100e6)
    assert hours.budget == pytest.approx(100e6 / 2e5 / 3600, rel=0.01)
    (by_tokens,), (by_flops,) = tokens.comparisons, flops.comparisons
    assert by_tokens.mean is not None
    assert by_flops.mean is not None
    assert by_flops.mean - by_tokens.mean == pytest.approx(0.0238, abs=2e-3)  # 0.5 * 0.05 / 1.05 of _loss, near the end


def test_the_cost_of_the_baselines_loss(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": 0.0, "good": -0.05, "bad": 0.05}, range(3), lines=100)
    found = {(each.arm, each.axis): each for each in reaching(sweep)}
    share = found["good", "tokens"].share
    assert share is not None
    assert 0.85 < share < 0.95  # the curve falls 0.55 nats over the budget's end: 0.05 are about a tenth of it
    assert (found["bad", "tokens"].share, found["bad", "tokens"].reached) == (None, 0)
