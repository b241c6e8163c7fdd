"""What trainer.deterministic decides, and what is said of it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch._inductor import config as inductor

from flexbert.kernels import gpu, is_deterministic
from recipe.config import load_run_config
from tests.helpers.tiny import write_config
from training.determinism import decide, describe


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    yield
    decide(True, 1)
    inductor.triton.autotune_pointwise = True
    os.environ.pop("NCCL_ALGO", None)


@pytest.mark.parametrize(
    ("wanted", "ranks", "expected"), [(None, 1, True), (None, 8, False), (True, 8, True), (False, 1, False)]
)
def test_one_word_decides_attention_nccl_and_inductor(wanted: bool | None, ranks: int, expected: bool) -> None:
    assert decide(wanted, ranks) is expected
    assert is_deterministic() is expected
    assert os.environ.get("NCCL_ALGO") == ("^NVLS,NVLSTree" if expected else None)
    assert inductor.triton.autotune_pointwise is not expected


def test_an_algorithm_of_the_users_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    decide(True, 8)
    assert os.environ["NCCL_ALGO"] == "Ring"


def test_bits_are_promised_where_they_hold(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with kernels of which it is not known, and not across ranks."""
    config = load_run_config(write_config(tmp_path, tiny_data, 1, model={"attention": {"backend": "auto"}}))
    assert describe(config, False, True).startswith("deterministic: no, ")
    assert "but for attention by " in describe(config, True, True)
    flash = load_run_config(write_config(tmp_path, tiny_data, 1, model={"attention": {"backend": "flash2"}}))
    assert describe(flash, True, True) == "deterministic: yes, attention by flash2 adds up in one order"
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "what is promised is one device" in describe(flash, True, True)
    assert gpu.is_deterministic()
