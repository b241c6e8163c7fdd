"""Evaluation of held-out text: a stream without a masked token has no loss, and no evaluation has none at all."""

import json
import logging
from pathlib import Path

import pytest

from flexbert_core.schema import ConfigError
from tests.helpers.in_process import PER_STEP, go
from tests.helpers.tiny import write_config


def test_a_stream_without_a_masked_token_has_no_loss(
    tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    run = go(write_config(tmp_path, tiny_data, 2, "full", "empty", evaluation={"max_rows": 4, "interval": PER_STEP}))
    validation = json.loads((run / "summary.json").read_text())["validation"]
    nothing = {"loss": None, "masked_accuracy": None, "unigram_accuracy": None, "masked_tokens": 0}
    assert validation["streams"]["empty"] == nothing
    assert validation["loss"] == validation["streams"]["full"]["loss"] > 1
    assert caplog.text.count("evaluation: no token of stream empty is masked, so it has no loss: raise") == 1
    with pytest.raises(ConfigError, match="evaluation: no token of the held-out text would be masked: raise"):
        go(write_config(tmp_path / "none", tiny_data, 2, "empty"))
    with pytest.raises(ConfigError, match="no token of the held-out text would be masked"):
        go(write_config(tmp_path / "rare", tiny_data, 2, evaluation={"masking": {"rate": 1e-6}}))
    assert not (tmp_path / "none" / "run").exists()
