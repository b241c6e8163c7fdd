"""Which checkpoints are kept: the best is the one with the least loss that is a number."""

import pytest

from training.checkpoints.retention import facts_of


@pytest.mark.parametrize(
    ("loss", "expected"), [("1.5", 1.5), ("0.0", None), ("NaN", None), ("Infinity", None), ("null", None)]
)
def test_only_a_loss_counts_as_best(loss: str, expected: float | None) -> None:
    assert facts_of(f'{{"run": {{"step": 3, "validation_loss": {loss}}}}}') == (3, expected)
