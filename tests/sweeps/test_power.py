"""The power of a design: against simulation, and at its edges."""

import io
import math
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import ttest_1samp

from commands.sweep_power import power
from data.keyed import keyed_generator
from flexbert_core.schema import ConfigError
from sweeps.power import PLANNED, seeds_for, smallest_difference


@pytest.mark.parametrize(("seeds", "comparisons"), [(3, 1), (3, 11), (5, 3), (10, 49)])
def test_the_smallest_difference_is_found_as_often_as_it_says(seeds: int, comparisons: int) -> None:
    """Of 20,000 paired differences, drawn; four standard errors are 1.1 %."""
    shift = smallest_difference(0.01, seeds, comparisons)
    draws = keyed_generator(1, "power", seeds).normal(shift, 0.01, (20_000, seeds))
    test: Any = ttest_1samp(draws, 0.0, axis=1)
    found = np.mean((test.pvalue <= 0.05 / comparisons) & (draws.mean(1) > 0))
    assert found == pytest.approx(PLANNED, abs=0.0113)


def test_the_textbook_value() -> None:
    """Cohen's d of a paired test with 34 pairs, power 0.80 at 0.05 (G*Power 3.1): 0.49 to two digits."""
    assert smallest_difference(1.0, 34, 1, power=0.8) == pytest.approx(0.4954, abs=1e-3)
    assert seeds_for(0.5, 1.0, 1, power=0.8) == 34


def test_seeds_are_the_fewest_that_do() -> None:
    for difference in (0.001, 0.005, 0.02, 1.0):
        seeds = seeds_for(difference, 0.005, 3)
        assert smallest_difference(0.005, seeds, 3) <= difference
        assert seeds == 2 or smallest_difference(0.005, seeds - 1, 3) > difference


def test_edges() -> None:
    assert smallest_difference(0.01, 1, 3) == math.inf
    assert smallest_difference(0.0, 3, 3) == 0.0
    assert smallest_difference(0.01, 2, 1000) > smallest_difference(0.01, 2, 3)
    with pytest.raises(ConfigError, match=r"--difference: 1e-09: more than 100,000 seeds"):
        seeds_for(1e-9, 1.0, 1)


def test_the_command_says_both() -> None:
    out = io.StringIO()
    power(0.005, 0.01, None, 3, Console(file=out, width=10_000))
    said = out.getvalue()
    assert f"A difference of 0.01 nats needs {seeds_for(0.01, 0.005, 3)} seeds." in said
    assert f"{smallest_difference(0.005, 3, 3):.4g}" in said


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((0.0, None, None, 3), "--noise: 0: give a number of nats above 0"),
        ((math.nan, None, None, 3), "--noise: nan: give"),
        ((0.1, -1.0, None, 3), "--difference: -1: give a number of nats above 0"),
        ((0.1, None, 1, 3), "--seeds: 1: one seed says nothing about seeds"),
        ((0.1, None, 3, 0), "--arms: 0 comparisons: give a baseline and at least one other arm"),
    ],
)
def test_bad_input_is_named(arguments: tuple[float, float | None, int | None, int], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        power(*arguments, Console(quiet=True))
    assert line in str(error.value)
