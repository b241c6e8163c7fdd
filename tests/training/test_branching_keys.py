"""What a branch (`from`) was told is used or said: its average of the weights, and keys that cannot hold together."""

import logging
from pathlib import Path

import pytest

from flexbert_core.schema import ConfigError
from tests.helpers.in_process import PER_STEP, branch, go, last
from tests.helpers.tiny import write_config

EMA = {"decay": 0.6}


@pytest.mark.slow
def test_a_branch_goes_on_with_the_average(tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One that repeats the rest of its origin's phases ends with the same weights and average, to the last bit."""
    caplog.set_level(logging.WARNING)
    straight = go(write_config(tmp_path / "straight", tiny_data, 6, ema=EMA))
    half = str(straight / "checkpoints" / f"tokens-{3 * PER_STEP}")
    same = go(branch(tmp_path / "same", tiny_data, half, 3, ema=EMA))
    assert "moving average" not in caplog.text
    ours, theirs = last(same, "ema.safetensors"), last(straight, "ema.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    ours, theirs = last(same, "model.safetensors"), last(straight, "model.safetensors")
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    card = (same / "exports" / f"tokens-{3 * PER_STEP}-ema" / "README.md").read_text()
    assert "6 updates" in card
    go(branch(tmp_path / "without", tiny_data, half, 1))
    assert f"from: {half}: has a moving average of the weights, which is left out: this run has no `ema`" in caplog.text
    weights_only = {"checkpoint": half, "weights_only": True}
    go(branch(tmp_path / "anew", tiny_data, weights_only, 1, ema=EMA))
    assert f"from: {half}: with weights_only the moving average of the weights begins anew" in caplog.text
    plain = go(write_config(tmp_path / "plain", tiny_data, 1))
    go(branch(tmp_path / "first", tiny_data, str(plain), 1, ema=EMA))
    assert "has no moving average of the weights: this one's begins anew" in caplog.text


def test_contradicting_keys_of_from_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    run = go(write_config(tmp_path / "run", tiny_data, 1))
    export = str(run / "exports" / f"tokens-{PER_STEP}")
    wrong = [
        ({"checkpoint": str(run), "weights_only": True, "data": "continue"}, "data: continue cannot hold with weights_only"),
        ({"checkpoint": export, "weights_only": True, "data": "continue"}, "data: continue cannot hold with weights_only"),
        ({"checkpoint": export, "weights_only": False}, f"from: {export}: weights_only: false cannot hold"),
        ({"checkpoint": export, "data": "continue"}, f"from: {export}: data: continue cannot hold"),
    ]  # fmt: skip
    for number, (origin, line) in enumerate(wrong):
        with pytest.raises(ConfigError) as error:
            go(branch(tmp_path / str(number), tiny_data, origin, 1))
        assert line in str(error.value)
        assert "\n" not in str(error.value)
    for number, origin in enumerate(({"checkpoint": export, "weights_only": True}, {"checkpoint": export, "data": "restart"})):  # fmt: skip
        assert go(branch(tmp_path / f"fine{number}", tiny_data, origin, 1)).is_dir()
