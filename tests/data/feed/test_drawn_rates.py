"""Masking `diffusion`: each row's rate is a function of its name, uniform over rows and spread over a lane's; what is
selected becomes [MASK]."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.feed.drawn_rates import LOWEST, thresholds
from data.feed.masking import MASKINGS, SELECT, Vocabulary
from data.feed.philox import RowNames, draws
from flexbert_core.schema import ConfigError
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from tests.helpers.tiny import write_config

SPECIAL = np.arange(64) < 5
MASK = 4


def masking() -> Any:
    vocabulary = Vocabulary(MASK, SPECIAL, np.flatnonzero(~SPECIAL), Path)
    return MASKINGS.build(MASKINGS.parse("diffusion"), vocabulary=vocabulary)


def names(keys: Any, numbers: Any) -> RowNames:
    return RowNames(np.asarray(keys, np.uint64), np.asarray(numbers, np.uint32))


def test_what_is_selected_is_masked_at_the_rows_rate() -> None:
    rng = np.random.default_rng(0)
    rows, length = 400, 200
    ids = rng.integers(0, 64, rows * length).astype(np.uint16)
    before = ids.copy()
    name = names(np.full(rows, 7), np.arange(rows))
    ends = np.arange(1, rows + 1) * length
    targets = masking().mask(ids, ends, name)
    selected = np.zeros(len(ids), bool)
    selected[targets.position] = True
    assert (ids[selected] == MASK).all()
    assert np.array_equal(ids[~selected], before[~selected])
    assert np.array_equal(targets.token, before[targets.position])
    assert not SPECIAL[targets.token].any()
    ordinary = ~SPECIAL[before]
    assert np.array_equal(targets.drawn.selectable, ordinary.reshape(rows, length).sum(1))
    # The plain reference: a token is selected where its own draw is under the rate of its row.
    rate = np.repeat(targets.drawn.rate, length)
    assert np.array_equal(selected, ordinary & (draws(ends, name, SELECT) / 2**32 < rate))
    share = (selected.reshape(rows, length).sum(1) - targets.drawn.rate * targets.drawn.selectable) / np.sqrt(length)
    assert abs(share).max() < 6 * 0.5
    assert np.std(share / np.sqrt(targets.drawn.rate * (1 - targets.drawn.rate) + 1e-3)) < 1.3


def test_rates_are_uniform_and_those_of_neighbours_apart() -> None:
    """Over plans of rows, (0, 1] is filled evenly; any eight rows in succession leave no gap over a quarter."""
    plans = np.arange(5000)
    first = thresholds(names(plans, np.zeros(5000))) / 2**32
    low = np.sort(first)
    assert first.min() >= LOWEST * (1 - 1e-6)
    assert first.max() <= 1
    # Kolmogorov and Smirnov at 1e-6: sqrt(ln(2 / 1e-6) / 2 / n)
    assert abs(low - (np.arange(5000) + 0.5) / 5000).max() < 2.7 / 5000**0.5
    for begin in (0, 3, 1000, 2**31):
        placed = np.sort(thresholds(names(np.full(8, 11), begin + np.arange(8))) / 2**32)
        gaps = np.append(np.diff(placed), placed[0] + 1 - placed[-1])
        assert gaps.max() < 0.25


def test_a_rate_follows_from_the_rows_name_alone() -> None:
    together = thresholds(names([5, 5, 9], [1, 2, 1]))
    for place, (key, number) in enumerate([(5, 1), (5, 2), (9, 1)]):
        assert thresholds(names([key], [number]))[0] == together[place]
    assert len(set(together.tolist())) == 3


def test_odd_shapes() -> None:
    none = masking().mask(np.zeros(0, np.uint16), np.zeros(0, np.int64), names([], []))
    assert (len(none.position), len(none.drawn.rate)) == (0, 0)
    # A row of special tokens only, one of one token, and one of none.
    ids = np.array([1, 2, 9], np.uint16)
    targets = masking().mask(ids, np.array([2, 3, 3]), names([1, 1, 1], [0, 1, 2]))
    assert targets.drawn.selectable.tolist() == [0, 1, 0]
    assert set(targets.position.tolist()) <= {2}


def test_the_weighed_sum_is_exact_on_average() -> None:
    """The mean of (masked tokens)/t over rates is the number of tokens: also of rates under the lowest."""
    rate = np.maximum((np.arange(10**6) + 0.5) / 10**6, LOWEST)
    length = 50
    drawn = np.random.default_rng(1).binomial(length, rate) / rate
    assert abs(drawn.mean() - length) < 6 * drawn.std() / 1000


def test_its_rate_is_no_choice() -> None:
    for node in ({"name": "diffusion", "rate": 0.3}, {"name": "diffusion", "rate_schedule": {"to": 0.5}}):
        with pytest.raises(ValueError, match=r"rate"):
            MASKINGS.parse(node)


def test_a_run_file_may_measure_and_train_with_it(tiny_data: Path, tmp_path: Path) -> None:
    changes = {"masking": "diffusion", "evaluation": {"masking": "diffusion"}}
    config = load_run_config(write_config(tmp_path, tiny_data, 2, "full", **changes))
    (phase,) = PhasePlan(config).phases
    assert phase.masking.describe() == "0.001 to 1, drawn for each row"
    assert (phase.masking.mean_rate, phase.masking.highest_rate) == (0.5, 1.0)
    assert config.evaluation.masking.rate == 0.5
    with pytest.raises(ConfigError, match=r"evaluation\.masking\.rate"):
        load_run_config(
            write_config(tmp_path, tiny_data, 2, evaluation={"masking": {"name": "diffusion", "rate": 0.2}})
        )
