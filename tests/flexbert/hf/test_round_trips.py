"""Every preset, made small: exported and read back, it is the same model."""

from pathlib import Path

import pytest
import torch

from flexbert import FlexBertConfig, build, from_hf, to_hf
from flexbert.config import PRESETS
from tests.helpers.architectures import IDS
from tests.helpers.models import scrambled
from tests.helpers.presets import SIZES
from tests.helpers.tokenizer import tokenizer_of


@pytest.mark.slow  # exports with code of their own are loaded in a process without FlexBERT
@pytest.mark.parametrize("preset", sorted(file.stem for file in PRESETS.glob("*.yaml")))
def test_an_exported_preset_comes_back(preset: str, tmp_path: Path) -> None:
    """Weights to the bit. Of the config may differ: `init`, which says nothing of trained weights; and token ids, which
    come from the tokenizer where transformers has the class, and stay as the model's where the export has its own."""
    node = FlexBertConfig.from_yaml(preset).to_dict() | SIZES
    node |= {"bos_token_id": None, "eos_token_id": None, "init": {"name": "default", "std": 0.2}}
    model = scrambled(build(FlexBertConfig.from_dict(node)))
    to_hf(model, tokenizer_of(97), tmp_path / "export")
    again = from_hf(tmp_path / "export")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    own_code = (tmp_path / "export" / "modeling_flexbert.py").exists()
    ours, theirs = model.config.to_dict() | ({} if own_code else IDS), again.config.to_dict()
    assert {key for key, value in ours.items() if theirs[key] != value} <= {"init"}
    encoder = from_hf(tmp_path / "export", task="encoder").state_dict()
    assert all(torch.equal(tensor, encoder[name]) for name, tensor in model.encoder.state_dict().items())
