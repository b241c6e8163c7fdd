"""`main.py sweep power`: what a design can show, before anything is trained."""

import math

from rich.console import Console
from rich.table import Table

from flexbert_core.schema import ConfigError
from sweeps.power import ALPHA, POWER, seeds_for, smallest_difference

_SEEDS = (2, 3, 4, 5, 6, 8, 10, 15, 20)


def power(noise: float, difference: float | None, seeds: int | None, comparisons: int, console: Console) -> None:
    """Print the smallest difference that seeds can show, and with `difference` how many seeds it needs.

    noise, difference: in nats. seeds: None shows several. comparisons: arms but the baseline.
    Raises ConfigError for what is no noise, no difference or no design.
    """
    for option, value in (("--noise", noise), ("--difference", difference)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{option}: {value:g}: give a number of nats above 0")
    if seeds is not None and seeds < 2:
        raise ConfigError(f"--seeds: {seeds}: one seed says nothing about seeds: give 2 or more")
    if comparisons < 1:
        raise ConfigError(f"--arms: {comparisons} comparisons: give a baseline and at least one other arm")
    table = Table("seeds", "smallest difference shown (nats)")
    for count in _SEEDS if seeds is None else (seeds,):
        table.add_row(str(count), f"{smallest_difference(noise, count, comparisons):.4g}")
    console.print(
        f"Paired t test over seeds, two-sided, level {ALPHA:g} over {comparisons} comparisons (Bonferroni, Holm's "
        f"first step), power {POWER:.0%}; noise {noise:g} nats, the standard deviation of a paired difference."
    )
    console.print(table)
    if difference is not None:
        console.print(f"A difference of {difference:g} nats needs {seeds_for(difference, noise, comparisons):,} seeds.")
