"""Settings of all tests of models."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)  # the promise of equal bits is made for threads too
