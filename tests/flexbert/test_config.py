"""Presets load, configs survive a round trip, and each rule answers in words that name the field and the fix."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from flexbert import FlexBertConfig, build
from flexbert.config import PRESETS
from flexbert.registry import SLOTS
from flexbert_core.schema import ConfigError
from tests.helpers.models import TINY, batch_of, tiny


@pytest.mark.parametrize("preset", sorted(file.stem for file in PRESETS.glob("*.yaml")))
def test_presets_load_and_build(preset: str) -> None:
    config = FlexBertConfig.from_yaml(preset)
    assert FlexBertConfig.from_yaml(PRESETS / f"{preset}.yaml") == config
    assert FlexBertConfig.from_yaml(str(PRESETS / f"{preset}.yaml")) == config
    with torch.device("meta"):
        model = build(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.config == config


def test_dict_round_trip_is_equal_and_plain() -> None:
    config = tiny(norm={"name": "layernorm", "bias": True, "eps": 1e-12}, pad_token_id=3)
    node = config.to_dict()
    assert FlexBertConfig.from_dict(node) == config
    assert node["norm"] == {"name": "layernorm", "eps": 1e-12, "bias": True}
    assert FlexBertConfig.from_dict(config.model_dump(mode="json")) == config


def test_a_slot_takes_a_name_or_a_mapping() -> None:
    assert tiny(norm="layernorm") == tiny(norm={"name": "layernorm"}) == tiny()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 48}, "model: unknown key 'hiden_size', did you mean 'hidden_size'?"),
        ({"hidden_size": 50}, "hidden_size: 50 is no multiple of num_attention_heads 3: try 48 or 51"),
        (
            {"hidden_size": 45},
            "hidden_size: 45 over num_attention_heads 3 is heads of 15, and position rope",
        ),
        ({"hidden_size": "48"}, "model: hidden_size: should be a valid integer, got '48'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: should be greater than or equal to 1, got 0"),
        ({"norm": "layrnorm"}, "model: norm: unknown norm 'layrnorm', did you mean 'layernorm'?"),
        ({"norm": {"name": "layernorm", "epz": 1}}, "norm: unknown key 'epz', did you mean 'eps'?"),
        ({"norm": {"name": "layernorm", "eps": 0.0}}, "norm.eps: should be greater than 0, got 0.0"),
        (
            {"mlp": {"name": "glu", "activation": "geluu"}},
            "mlp.activation: unknown activation 'geluu', did you mean 'gelu'?",
        ),
        ({"attention": {"window_per_side": 0}}, "window_per_side: should be greater than or equal to 1, got 0"),
        (
            {"attention": {"backend": "flash"}},
            "backend: should be 'auto', 'eager', 'sdpa', 'tiled', 'flash2', 'flash3', 'torch_flash' or 'flex', got 'flash'",
        ),
        ({"attention": {"out_dropout": 1.0}}, "attention.out_dropout: should be less than 1, got 1.0"),
        ({"position": {"global_theta": 0.0}}, "position.global_theta: should be greater than or equal to 1, got 0.0"),
        (
            {"position": {"local_theta": 1e-300}},
            "position.local_theta: should be greater than or equal to 1, got 1e-300",
        ),
        ({"position": {"name": "sinusoidal", "theta": 1e-300}}, "position.theta: should be greater than or equal to 1"),
        (
            {"position": {"name": "learned", "offset": 10**15}},
            "position.offset: should be less than or equal to 16777216",
        ),
        (
            {"embedding": {"name": "tokens", "token_types": 10**15}},
            "token_types: should be less than or equal to 65536",
        ),
        (
            {"init": {"name": "full_megatron", "cutoff_factor": 1e300}},
            "cutoff_factor: should be less than or equal to 100",
        ),
        ({"init": {"name": "normal", "std": 1e300}}, "init.std: should be less than or equal to 100"),
        ({"norm": {"name": "rmsnorm", "eps": 1e300}}, "norm.eps: should be less than or equal to 1"),
        ({"initial_layers": {"count": 5}}, "initial_layers.count: 5 is more than num_hidden_layers 4: at most that"),
        (
            {
                "block": "postnorm",
                "embedding": {"norm": False, "name": "tokens"},
                "initial_layers": {"block": "prenorm"},
            },
            "initial_layers: block.skip_first_attention_norm: leaves layer 0 without any norm",
        ),
        (
            {"position": {"rotary_fraction": 0.05}},
            "position.rotary_fraction: 0.05 of heads of 16 is 0.8, no even number",
        ),
        (
            {"position": {"rotary_fraction": 0.1875}},
            "position.rotary_fraction: 0.1875 of heads of 16 is 3, no even number",
        ),
        ({"mask_token_id": 97}, "mask_token_id: 97 is outside the vocabulary of 97: null takes the tokenizer's"),
        (
            {"embedding": {"name": "tokens", "norm": False}},
            "skip_first_attention_norm: leaves layer 0 without any norm",
        ),
        ({"vocab_size": None}, "vocab_size: should be a valid integer, got None"),
    ],
    ids=str,
)
def test_errors_say_what_and_how(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(**changes)
    assert message in str(caught.value)
    assert str(caught.value).startswith("model: ")


def test_a_rule_holds_where_its_component_is_used() -> None:
    without_norm = {"embedding": {"name": "tokens", "norm": False}}
    model = build(tiny(**without_norm, initial_layers={"count": 1, "block": "postnorm"}))
    batch = batch_of((5, 70))
    assert model(*batch[:3]).logits.isfinite().all()
    # No layer has the model's own attention: its groups need not divide
    attention = {"name": "multihead", "num_key_value_heads": 2}
    build(tiny(attention=attention, initial_layers={"count": 4, "attention": "multihead"}))
    with pytest.raises(ConfigError, match="model: attention.num_key_value_heads: 2 does not divide"):
        tiny(attention=attention, initial_layers={"count": 3, "attention": "multihead"})


@pytest.mark.parametrize(("heads", "fraction", "dim"), [(1, 0.14, 14), (1, 0.58, 58), (5, 0.7, 14), (2, 1.0, 50)])
def test_rotary_fractions_that_no_binary_number_is_are_accepted(heads: int, fraction: float, dim: int) -> None:
    position = {"name": "rope", "rotary_fraction": fraction}
    config = tiny(hidden_size=100, num_attention_heads=heads, num_hidden_layers=1, position=position)
    assert config.position.rotary_dim(100 // heads) == dim
    build(config)(*batch_of((5, 9)))


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ConfigError, match="model: vocab_size: is required and missing"):
        FlexBertConfig.from_dict({key: value for key, value in TINY.items() if key != "vocab_size"})


def test_unknown_preset_and_file_suggest_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'modernbert-bas', did you mean 'modernbert-base'\?"):
        FlexBertConfig.from_yaml("modernbert-bas")
    with pytest.raises(ConfigError, match="no such file"):
        FlexBertConfig.from_yaml(tmp_path / "absent.yaml")


def test_errors_of_a_file_start_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("vocab_size: 97\nhidden_size: 50\nnum_attention_heads: 3\n")
    with pytest.raises(ConfigError) as caught:
        FlexBertConfig.from_yaml(path)
    assert str(caught.value).startswith(f"{path}: hidden_size: 50 is no multiple")


def test_every_field_is_described_and_every_number_has_a_range() -> None:
    configs: list[type[BaseModel]] = [FlexBertConfig]
    slots = [slot for name, slot in SLOTS.items() if name != "activation"]  # a name is all there is
    configs += [entry.Config for slot in slots for entry in slot.entries.values()]
    assert len(configs) > len(SLOTS)
    for config in configs:
        for name, field in config.model_fields.items():
            if name == "name" or config.__module__.startswith("tests."):
                continue
            assert field.description, f"{config.__qualname__}.{name} has no description"
            if field.annotation in (int, float):
                assert field.metadata, f"{config.__qualname__}.{name} has no range"
