"""Verdicts keep what they promise, over simulated sweeps. benchmarks/calibration.py does the same with many more."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.calibration import Noise, false_alarms, finds, measured, noises, share
from data.keyed import keyed_generator
from flexbert_core.schema import ConfigError
from sweeps.statistics import called, holm, over_seeds

LOSSES = np.array([[2.101, 2.143, 2.082, 2.117], [2.109, 2.147, 2.085, 2.121], [2.095, 2.139, 2.079, 2.108]])
SWEEPS = 20_000


@pytest.mark.parametrize("noise", noises(LOSSES), ids=lambda noise: noise.name)
def test_identical_arms_are_rarely_called_different(noise: Noise) -> None:
    """At most 5 %: a share above it by chance alone is within the interval at 99 %."""
    found = false_alarms(noise, 4, 5, SWEEPS, 5)
    assert share(round(found.share * SWEEPS), SWEEPS, 0.99).low <= 0.05


@pytest.mark.parametrize("noise", noises(LOSSES), ids=lambda noise: noise.name)
def test_the_smallest_visible_difference_is_mostly_found(noise: Noise) -> None:
    found = finds(noise, 4, 5, SWEEPS, 6)
    assert share(round(found.share * SWEEPS), SWEEPS, 0.99).high >= 0.8


def test_the_measured_noise_has_the_simulated_deviation() -> None:
    """The root of 2 times a run's own, which what is left of two-way means estimates with 2 * 3 degrees of freedom."""
    rest = LOSSES - LOSSES.mean(0) - LOSSES.mean(1, keepdims=True) + LOSSES.mean()
    for noise in noises(LOSSES):
        assert noise.deviation == pytest.approx(np.sqrt(2 * (rest**2).sum() / 6))
        drawn = noise.draw(np.random.default_rng(0), (400, 400))
        assert np.sqrt(2) * drawn.std() == pytest.approx(noise.deviation, rel=0.02)


def test_measured_losses_are_whole(tmp_path: Path) -> None:
    file = tmp_path / "losses.json"
    file.write_text(
        json.dumps({"a": {"1": 2.0, "2": 2.1}, "same": {"1": 2.0, "2": 2.1000000001}, "b": {"1": 2.2, "2": 2.2}})
    )
    assert measured(file).tolist() == [[2.0, 2.1], [2.2, 2.2]]
    file.write_text(json.dumps({"a": {"1": 2.0, "2": 2.1}, "b": {"1": 2.2}}))
    with pytest.raises(ConfigError, match="b has no final loss of seed 2"):
        measured(file)
    file.write_text(json.dumps({"a": {"1": 2.0}}))
    with pytest.raises(ConfigError, match="two different arms and two seeds"):
        measured(file)


@pytest.mark.parametrize("noise", noises(LOSSES), ids=lambda noise: noise.name)
def test_stopping_most_arms_makes_no_false_alarms(noise: Noise) -> None:
    """Identical arms, of which the best two of twelve by a loss under way are trained to the end. Stopped arms count in
    the family; without them the survivors are called better too often."""
    sweeps, arms, seeds = 20_000, 13, 4
    rng = keyed_generator(8, "stopping")
    under_way = noise.draw(rng, (sweeps, arms, seeds))
    final = 3.0 + 0.9 * under_way + 0.4 * noise.draw(rng, (sweeps, arms, seeds))
    found = over_seeds(final[:, 1:], final[:, :1], paired=True)
    last = np.argsort(under_way[:, 1:].mean(-1), axis=1)
    np.put_along_axis(survivors := found.p.copy(), last[:, 2:], np.nan, 1)

    def alarms(p: np.ndarray, mean: np.ndarray) -> float:
        return share(int(called(holm(p), mean).any(1).sum()), sweeps, 0.99).low

    assert alarms(survivors, found.mean) <= 0.05
    alone = [np.take_along_axis(each, last[:, :2], 1) for each in (found.p, found.mean)]
    assert alarms(alone[0], alone[1]) > 0.05
