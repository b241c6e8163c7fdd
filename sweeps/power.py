"""How small a difference a design can show, and how many seeds a difference needs.

A two-sided paired t test over n seeds, of a difference d whose standard deviation over seeds is s, has n - 1 degrees of
freedom and, under d, the noncentral t distribution with noncentrality d * sqrt(n) / s (scipy.stats.nct). Of a family of
k comparisons the test is at alpha / k: Bonferroni's level, which is the first step of Holm's (1979) and so a bound for
the others. Holm finds whatever Bonferroni finds, so the power of a verdict is at least the one here. Found means: with
the right sign.
"""

import math
from typing import Any

from scipy.optimize import brentq
from scipy.stats import nct, t

from flexbert_core.schema import ConfigError

ALPHA = 0.05
POWER = 0.8
"""What is promised."""
PLANNED = POWER + 0.01
"""What is reckoned with: noise of real runs is not normal, which took up to 0.3 % from it (docs/report.md)."""
_MOST_SEEDS = 100_000


def smallest_difference(
    noise: float, seeds: int, comparisons: int, alpha: float = ALPHA, power: float = PLANNED
) -> float:
    """The difference that is found with probability `power`, in the unit of `noise`.

    noise: standard deviation of a paired difference between two arms over seeds. comparisons: arms but the baseline.
    Infinite of one seed, which shows nothing about seeds; 0 without noise.
    """
    if seeds < 2:
        return math.inf
    return visible(noise / math.sqrt(seeds), seeds - 1, comparisons, alpha, power)


def visible(error: float, freedom: float, comparisons: int, alpha: float = ALPHA, power: float = PLANNED) -> float:
    """The same for a mean difference with this standard error and these degrees of freedom."""
    if error == 0:
        return 0.0
    bar = float(t.isf(alpha / max(comparisons, 1) / 2, freedom))

    def missing(shift: float) -> float:
        return float(nct.sf(bar, freedom, shift)) - power

    high = bar + 1.0
    while missing(high) < 0:
        high *= 2
    root: Any = brentq(missing, 0.0, high, xtol=1e-10 * high)
    return error * float(root)


def seeds_for(difference: float, noise: float, comparisons: int, alpha: float = ALPHA, power: float = PLANNED) -> int:
    """The fewest seeds, 2 or more, with which such a difference is found with probability `power`.

    Raises ConfigError when more than 100,000 would not do.
    """

    def enough(seeds: int) -> bool:
        return smallest_difference(noise, seeds, comparisons, alpha, power) <= difference

    high = 2
    while not enough(high):
        high *= 2
        if high > _MOST_SEEDS:
            raise ConfigError(
                f"--difference: {difference:g}: more than {_MOST_SEEDS:,} seeds would not show it in noise of "
                f"{noise:g}: give a larger difference"
            )
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high if high > 2 else 2
