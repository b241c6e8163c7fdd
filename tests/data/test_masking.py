"""Keyed masking: the published split, special tokens untouched, equal for equal keys."""

import numpy as np
import pytest
from pydantic import ValidationError

from data.masking import IGNORE, Masker, MaskingConfig, RowKey

VOCAB, SPECIAL = 64, [0, 1, 2, 3, 4, 63]
ROWS, LENGTH = 400, 512


def rows(config: MaskingConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH))
    masker = Masker(7, 4, SPECIAL, VOCAB)
    pairs = [masker.mask(row, RowKey(0, 3, 512, number), config) for number, row in enumerate(ids)]
    return ids, np.stack([pair[0] for pair in pairs]), np.stack([pair[1] for pair in pairs])


@pytest.mark.parametrize(
    "config",
    [MaskingConfig(), MaskingConfig(rate=0.15, mask_fraction=0.5, random_fraction=0.5), MaskingConfig(rate=1.0)],
)
def test_rates_and_split(config: MaskingConfig) -> None:
    ids, masked, labels = rows(config)
    special = np.isin(ids, SPECIAL)
    selected = labels != IGNORE
    assert not selected[special].any()
    assert (labels[selected] == ids[selected]).all()
    assert (masked[~selected] == ids[~selected]).all()

    def near(hits: int, trials: int, probability: float) -> bool:
        """Within six standard deviations of the binomial: fails by chance once in 5e8 trials of a right program."""
        return abs(hits - trials * probability) <= 6 * np.sqrt(trials * probability * (1 - probability)) + 1e-9

    words = int((~special).sum())
    count = int(selected.sum())
    assert near(count, words, config.rate)
    is_mask = masked == 4
    assert near(int((selected & is_mask).sum()), count, config.mask_fraction)
    # A random replacement hits the token itself once in 58 draws.
    changed = int((selected & ~is_mask & (masked != ids)).sum())
    allowed = VOCAB - len(SPECIAL)
    assert near(changed, count, config.random_fraction * (allowed - 1) / allowed)


def test_replacements_are_uniform_over_ordinary_tokens() -> None:
    config = MaskingConfig(rate=1.0, mask_fraction=0.0, random_fraction=1.0)
    ids, masked, _ = rows(config)
    drawn = masked[~np.isin(ids, SPECIAL)]
    assert not np.isin(drawn, SPECIAL).any()
    counts = np.bincount(drawn, minlength=VOCAB)[[token for token in range(VOCAB) if token not in SPECIAL]]
    expected = counts.sum() / len(counts)
    # chi-square with 57 degrees of freedom: mean 57, standard deviation 10.7
    assert ((counts - expected) ** 2 / expected).sum() < 57 + 6 * 10.7


def test_the_key_decides() -> None:
    ids = np.arange(5, 60).repeat(4)
    masker, config = Masker(7, 4, SPECIAL, VOCAB), MaskingConfig()
    base = RowKey(0, 3, 512, 1)
    first = masker.mask(ids, base, config)[1]
    masker.mask(ids, RowKey(1, 0, 0, 0), config)  # drawing elsewhere in between changes nothing
    np.testing.assert_array_equal(masker.mask(ids, base, config)[1], first)
    np.testing.assert_array_equal(Masker(7, 4, SPECIAL, VOCAB).mask(ids, base, config)[1], first)
    others = [RowKey(1, 3, 512, 1), RowKey(0, 4, 512, 1), RowKey(0, 3, 513, 1), RowKey(0, 3, 512, 2)]
    different = [masker.mask(ids, key, config)[1] for key in others] + [
        Masker(8, 4, SPECIAL, VOCAB).mask(ids, base, config)[1]
    ]
    assert all((labels != first).any() for labels in different)


def test_split_over_one_is_refused() -> None:
    with pytest.raises(ValidationError, match="must be at most 1"):
        MaskingConfig(mask_fraction=0.8, random_fraction=0.3)
