"""Settings of all tests of kernels."""

import pytest
from torch.nn.attention import flex_attention


@pytest.fixture(autouse=True)
def _flex_has_gradients_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention's uncompiled form has right ones there, and stands in for its kernel; torch 2.9 and later refuse it."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None, raising=False)
