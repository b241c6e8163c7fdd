"""Keyed masking: the published generator and split, special tokens untouched, equal for equal names."""

from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from data.feed.masking import IGNORE, MASKINGS, HidingConfig, Masking, Targets, TokenMasking, Vocabulary, hide
from data.feed.philox import RowNames, draws, philox4x32
from data.keyed import philox_key

VOCAB, SPECIAL = 64, [0, 1, 2, 3, 4, 63]
ROWS, LENGTH = 400, 510
_IS_SPECIAL = np.isin(np.arange(VOCAB), SPECIAL)
VOCABULARY = Vocabulary(4, _IS_SPECIAL, np.flatnonzero(~_IS_SPECIAL), tokenizer=Path)


def tokens(**options: Any) -> TokenMasking.Config:
    return TokenMasking.Config(name="tokens", **options)


class Hiding:
    """What `hide` does with tokens that are selected one by one."""

    def __init__(self, config: HidingConfig) -> None:
        self.config = config

    def mask(self, input_ids: NDArray[np.unsignedinteger], row_ends: NDArray[np.int64], rows: RowNames) -> Targets:
        selected = draws(row_ends, rows, 16) < self.config.rate * 2.0**32
        return hide(input_ids, row_ends, rows, selected, self.config, VOCABULARY)


@numba.njit
def draw(counter: np.ndarray, key: np.uint64) -> tuple[np.uint32, np.uint32, np.uint32, np.uint32]:
    return philox4x32(np.uint32(counter[0]), np.uint32(counter[1]), np.uint32(counter[2]), np.uint32(counter[3]), key)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: int, expected: list[int]) -> None:
    """The known answers of philox4x32-10 that its authors publish with Random123 (kat_vectors)."""
    assert list(draw(np.array(counter, np.uint32), np.uint64(key))) == expected


def names(count: int, key: int = 11, first: int = 0) -> RowNames:
    return RowNames(np.full(count, key, np.uint64), np.arange(first, first + count).astype(np.uint32))


def apply(
    ids: np.ndarray, rows: RowNames, config: HidingConfig, dtype: str = "uint16", masking: Masking | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Masked ids and labels, both of the shape of ids (rows, length)."""
    flat = ids.reshape(-1).astype(dtype)
    ends = np.arange(1, len(ids) + 1) * ids.shape[1]
    used: Masking = masking or MASKINGS.build(config, vocabulary=VOCABULARY)
    targets = used.mask(flat, ends, rows)
    labels = np.full(ids.size, IGNORE)
    labels[targets.position] = targets.token
    assert (np.diff(targets.position) > 0).all()
    return flat.reshape(ids.shape).astype(np.int64), labels.reshape(ids.shape)


def near(hits: int, trials: int, probability: float) -> bool:
    """Within six standard deviations of the binomial: fails by chance once in 5e8 trials of a right program."""
    return abs(hits - trials * probability) <= 6 * np.sqrt(trials * probability * (1 - probability)) + 1e-9


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("through_hide", [False, True])
@pytest.mark.parametrize(
    "config", [tokens(), tokens(rate=0.15, mask_fraction=0.5, random_fraction=0.5), tokens(rate=1.0)]
)
def test_rates_and_split(config: HidingConfig, dtype: str, through_hide: bool) -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH))
    masked, labels = apply(ids, names(ROWS), config, dtype, Hiding(config) if through_hide else None)
    special = np.isin(ids, SPECIAL)
    selected = labels != IGNORE
    assert not selected[special].any()
    assert (labels[selected] == ids[selected]).all()
    assert (masked[~selected] == ids[~selected]).all()
    words = int((~special).sum())
    count = int(selected.sum())
    assert near(count, words, config.rate)
    is_mask = masked == 4
    assert near(int((selected & is_mask).sum()), count, config.mask_fraction)
    # A random replacement hits the token itself once in 58 draws.
    changed = int((selected & ~is_mask & (masked != ids)).sum())
    allowed = VOCAB - len(SPECIAL)
    assert near(changed, count, config.random_fraction * (allowed - 1) / allowed)


def test_every_position_is_selected_alike() -> None:
    ids = np.full((20_000, 13), 9)
    _, labels = apply(ids, names(20_000), tokens())
    hits = (labels != IGNORE).sum(0)
    assert all(near(int(count), 20_000, 0.3) for count in hits)
    together = ((labels[:, :-1] != IGNORE) & (labels[:, 1:] != IGNORE)).sum(0)
    assert all(near(int(count), 20_000, 0.09) for count in together)
    below = ((labels[:-1] != IGNORE) & (labels[1:] != IGNORE)).sum(0)  # the same place of neighbouring rows
    assert all(near(int(count), 19_999, 0.09) for count in below)


@pytest.mark.parametrize("through_hide", [False, True])
def test_replacements_are_uniform_over_ordinary_tokens(through_hide: bool) -> None:
    config = tokens(rate=1.0, mask_fraction=0.0, random_fraction=1.0)
    ids = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH))
    masked, _ = apply(ids, names(ROWS), config, masking=Hiding(config) if through_hide else None)
    drawn = masked[~np.isin(ids, SPECIAL)]
    assert not np.isin(drawn, SPECIAL).any()
    counts = np.bincount(drawn, minlength=VOCAB)[[token for token in range(VOCAB) if token not in SPECIAL]]
    expected = counts.sum() / len(counts)
    # chi-square with 57 degrees of freedom: mean 57, standard deviation 10.7
    assert ((counts - expected) ** 2 / expected).sum() < 57 + 6 * 10.7


def test_the_name_decides() -> None:
    ids = np.arange(5, 60).repeat(4)[None]
    config = tokens()
    first = apply(ids, names(1, first=3), config)
    # The same row among others, which are of other lengths, is masked the same.
    flat = np.concatenate([np.full(7, 9), ids[0], np.full(1, 9)]).astype(np.uint16)
    rows = RowNames(np.array([11, 11, 5], np.uint64), np.array([2, 3, 3], np.uint32))
    masking = MASKINGS.build(config, vocabulary=VOCABULARY)
    masking.mask(flat, np.array([7, 7 + ids.size, 8 + ids.size]), rows)
    np.testing.assert_array_equal(flat[7:-1], first[0][0])
    others = [names(1, first=4), names(1, key=12, first=3), names(1, key=11 + 2**40, first=3)]
    different = [apply(ids, other, config)[1] for other in others]
    assert all((labels != first[1]).any() for labels in different)
    places = [(0, 1, 2), (1, 0, 2), (0, 2, 1)]
    assert len({int(philox_key(seed, "mask", *place)[0]) for seed in (7, 8) for place in places}) == 6


def test_draws_are_those_of_the_generator() -> None:
    """Four numbers of a counter serve four tokens of a row, whatever rows stand before it."""
    ends = np.array([1, 8, 8, 14])
    rows = RowNames(np.array([3, 2**40, 5, 6], np.uint64), np.array([9, 0, 1, 2**31], np.uint32))
    found, begin = draws(ends, rows, 17), 0
    for end, key, number in zip(ends.tolist(), rows.key, rows.number, strict=True):
        four = [draw(np.array([place, number, 17, 0], np.uint32), key) for place in range(2)]
        np.testing.assert_array_equal(found[begin:end], np.concatenate(four)[: end - begin])
        begin = end


def test_no_rows() -> None:
    rows = RowNames(np.zeros(0, np.uint64), np.zeros(0, np.uint32))
    for masking in (MASKINGS.build(tokens(), vocabulary=VOCABULARY), Hiding(tokens())):
        targets = masking.mask(np.zeros(0, np.uint16), np.zeros(0, np.int64), rows)
        assert len(targets.position) == len(targets.token) == 0


def test_split_over_one_is_refused() -> None:
    with pytest.raises(ValidationError, match="must be at most 1"):
        tokens(mask_fraction=0.8, random_fraction=0.3)
