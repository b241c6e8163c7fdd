"""Whether verdicts keep what they promise, over sweeps simulated from the noise of real runs.

    python -m benchmarks.calibration SWEEP            # a sweep's folder, or a JSON file {arm: {seed: final loss}}

Two promises: of arms that are the baseline over again, none is called better or worse in at least 95 % of sweeps; and
an arm that is better by the printed smallest visible difference is called better in at least 80 %. Each is a share of
sweeps with its Clopper-Pearson interval at 95 %. `kept` says that the interval does not lie on the wrong side.

A run's noise is what is left of its loss without its arm's and its seed's mean, and scaled by its degrees of freedom.
Simulated runs draw it from the normal distribution (`normal`), and from the measured ones themselves (`resampled`).
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from benchmarks.arguments import count, parser_of
from data.keyed import keyed_generator
from flexbert_core.schema import ConfigError
from sweeps.power import ALPHA, POWER, smallest_difference
from sweeps.statistics import called, final_losses, holm, over_seeds

Losses = NDArray[np.float64]
Calls = NDArray[np.int64]


_ROUNDING = 1e-6  # of a loss: what another order of sums makes of it over some steps


class Share(NamedTuple):
    """Of simulated sweeps, with its Clopper-Pearson interval."""

    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Noise:
    """name: of how a run's own noise is drawn. draw: (generator, shape) -> nats. deviation: of a paired difference."""

    name: str
    draw: Callable[[np.random.Generator, tuple[int, ...]], Losses]
    deviation: float


def measured(path: Path) -> Losses:
    """(arms, seeds) final losses; arms that are equal in every seed but for rounding, as of one config, count once.

    Raises ConfigError for a missing cell, and where there are not two arms and two seeds.
    """
    if path.is_dir():
        from sweeps.folder import read_sweep

        sweep = read_sweep(path)
        values = final_losses(sweep)[0]
        cells = {arm.name: {str(seed): values[arm.name, seed] for seed in sweep.seeds} for arm in sweep.arms}
    else:
        try:
            cells = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path}: {error}: give a sweep's folder, or a JSON file {{arm: {{seed: loss}}}}"
            ) from None
    seeds = sorted({seed for arm in cells.values() for seed in arm})
    rows = []
    for name, arm in cells.items():
        missing = [seed for seed in seeds if arm.get(seed) is None]
        if missing:
            raise ConfigError(f"{path}: {name} has no final loss of seed {missing[0]}: finish the sweep first")
        row = [float(value) for seed in seeds if (value := arm[seed]) is not None]
        if not any(np.allclose(row, other, rtol=_ROUNDING, atol=0) for other in rows):
            rows.append(row)
    if len(rows) < 2 or len(seeds) < 2:
        raise ConfigError(f"{path}: noise takes two different arms and two seeds at least")
    return np.array(rows)


def noises(losses: Losses) -> list[Noise]:
    """Both ways to draw, of the same deviation."""
    arms, seeds = losses.shape
    rest = losses - losses.mean(0) - losses.mean(1, keepdims=True) + losses.mean()
    rest *= np.sqrt(arms * seeds / ((arms - 1) * (seeds - 1)))
    deviation = float(np.sqrt((rest**2).mean()))
    of_pair = float(np.sqrt(2)) * deviation
    return [
        Noise("normal", lambda rng, shape: deviation * rng.standard_normal(shape), of_pair),
        Noise("resampled", lambda rng, shape: rest.ravel()[rng.integers(rest.size, size=shape)], of_pair),
    ]


def simulate(noise: Noise, arms: int, seeds: int, effect: float, sweeps: int, seed: int) -> Calls:
    """(sweeps, arms - 1): -1 where an arm is called better than the baseline, 1 where worse, else 0, by what verdicts
    are made of. effect: of the first arm, in nats; the others are the baseline again."""
    rng = keyed_generator(seed, f"calibration/{noise.name}", arms, seeds)
    shared = 10 * noise.deviation * rng.standard_normal((sweeps, 1, seeds))
    losses = 3.0 + noise.draw(rng, (sweeps, arms, seeds)) + shared
    losses[:, 1] += effect
    found = over_seeds(losses[:, 1:], losses[:, :1], paired=True)
    return called(holm(found.p), found.mean)


def share(hits: int, of: int, confidence: float = 0.95) -> Share:
    interval = binomtest(hits, of).proportion_ci(confidence, method="exact")
    return Share(hits / of, float(interval.low), float(interval.high))


def false_alarms(noise: Noise, arms: int, seeds: int, sweeps: int, seed: int) -> Share:
    """Sweeps in which any of the identical arms is called better or worse."""
    found = simulate(noise, arms, seeds, 0.0, sweeps, seed)
    return share(int(found.any(1).sum()), sweeps)


def finds(noise: Noise, arms: int, seeds: int, sweeps: int, seed: int) -> Share:
    """Sweeps in which an arm that is better by the smallest visible difference is called better."""
    effect = -smallest_difference(noise.deviation, seeds, arms - 1)
    found = simulate(noise, arms, seeds, effect, sweeps, seed)
    return share(int((found[:, 0] == -1).sum()), sweeps)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("source", type=Path, metavar="SWEEP|JSON")
    parser.add_argument("--sweeps", type=count, default=20_000, help="simulated of each kind; default: 20000")
    parser.add_argument("--arms", type=count, default=4, help="with the baseline; default: 4")
    parser.add_argument("--seeds", type=count, help="default: 3, 5 and 8")
    arguments = parser.parse_args()
    if arguments.arms < 2 or (arguments.seeds or 2) < 2:
        parser.error("--arms, --seeds: 2 or more")
    try:
        losses = measured(arguments.source)
    except ConfigError as error:
        parser.error(str(error))
    for noise in noises(losses):
        for seeds in [arguments.seeds] if arguments.seeds else [3, 5, 8]:
            _print(noise, seeds, losses, arguments)


def _print(noise: Noise, seeds: int, losses: Losses, arguments: argparse.Namespace) -> None:
    alarms = false_alarms(noise, arguments.arms, seeds, arguments.sweeps, 0)
    found = finds(noise, arguments.arms, seeds, arguments.sweeps, 1)
    line: dict[str, Any] = {"benchmark": "calibration", "noise": noise.name, "of_runs": losses.size}
    line |= {"arms": arguments.arms, "seeds": seeds, "sweeps": arguments.sweeps}
    line |= {"deviation": float(f"{noise.deviation:.4g}")}
    line |= {"visible": float(f"{smallest_difference(noise.deviation, seeds, arguments.arms - 1):.4g}")}
    line |= {"false_alarms": _rounded(alarms), "false_alarms_kept": alarms.low <= ALPHA}
    line |= {"found": _rounded(found), "found_kept": found.high >= POWER}
    print(json.dumps(line), flush=True)


def _rounded(values: Share) -> list[float]:
    return [round(value, 4) for value in values]


if __name__ == "__main__":
    main()
