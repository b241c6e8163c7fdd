"""A component of any kind, written outside the package, works from YAML at once."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import nn

from flexbert import FlexBertConfig, build, register, registered
from flexbert.config import ModelComponent
from flexbert.registry import ELSEWHERE, SLOTS
from flexbert_core.schema import Component, ConfigError
from tests.flexbert.parts import (
    Bigram,
    Gated,
    MeanOfSequence,
    Narrow,
    Ramp,
    Relu,
    Scale,
)
from tests.helpers.models import batch_of, gradients, tiny
from tests.helpers.registries import registries_as_before

LINES: dict[str, tuple[str, Any]] = {
    "norm": ("norm: {name: test_scale, start: 4}", Scale),
    "mlp": ("mlp: test_relu", Relu),
    "activation": ("mlp: {name: glu, activation: test_sine}", None),
    "embedding": ("embedding: {name: test_bigram, buckets: 32}\nblock: postnorm", Bigram),
    "position": ("position: {name: test_ramp, slope: 0.02}", Ramp),
    "attention": ("attention: test_mean", MeanOfSequence),
    "block": ("block: test_gated", Gated),
    "head": ("head: {name: test_narrow, width: 12}", Narrow),
    "loss": ("loss: {name: test_focal, gamma: 1.0}", None),
    "init": ("init: {name: test_constant, value: 0.3}", None),
}


@pytest.mark.parametrize("slot", SLOTS)
def test_a_new_component_trains_from_yaml(slot: str, tmp_path: Path) -> None:
    line, kind = LINES[slot]
    path = tmp_path / "model.yaml"
    path.write_text(
        "vocab_size: 97\nhidden_size: 32\nnum_hidden_layers: 2\nnum_attention_heads: 2\nintermediate_size: 64\n"
        f"{line}\n"
    )
    config = FlexBertConfig.from_yaml(path)
    assert FlexBertConfig.from_dict(config.to_dict()) == config
    model = build(config)
    if kind is not None:
        assert any(isinstance(module, kind) for module in model.modules())
    batch = batch_of((5, 40))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(*batch).loss
        assert loss is not None
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        gradients(model)
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_what_new_components_say_and_do_reaches_the_model() -> None:
    node = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    batch = batch_of((5, 40))
    plain = build(FlexBertConfig.from_dict(node))
    model = build(FlexBertConfig.from_dict({**node, "norm": {"name": "test_scale", "start": 4}, "mlp": "test_relu"}))
    assert isinstance(model.encoder.final_norm, Scale)
    assert (model.encoder.final_norm.scale == 4).all()
    bias = "encoder.layers.0.mlp.first.bias"
    assert not model.get_parameter(bias).any(), "the init slot did not reach the new component"
    focal = build(FlexBertConfig.from_dict({**node, "loss": {"name": "test_focal", "gamma": 0.0}}))
    torch.testing.assert_close(focal(*batch).loss, plain(*batch).loss)
    torch.testing.assert_close(focal(*batch).scores, plain(*batch).scores)
    constant = build(FlexBertConfig.from_dict({**node, "init": "test_constant"}))
    assert constant.get_parameter("encoder.layers.0.attn.Wo.weight")[3, 3] == 0.5
    sine_mlp = build(FlexBertConfig.from_dict({**node, "mlp": {"name": "glu", "activation": "test_sine"}}))
    assert not torch.equal(sine_mlp(*batch[:3]).hidden_states, plain(*batch[:3]).hidden_states)
    classifier = build(
        FlexBertConfig.from_dict({**node, "head": {"name": "test_last", "num_labels": 5}}), "classification"
    )
    assert classifier(*batch[:3]).logits.shape == (2, 5)


def test_registered_lists_names_and_register_guards_them() -> None:
    assert {"layernorm", "test_scale"} <= set(registered("norm"))
    assert registered("mlp") == sorted(registered("mlp"))
    with pytest.raises(ConfigError, match=r"unknown slot 'norms', did you mean 'norm'\?"):
        registered("norms")
    with pytest.raises(ConfigError, match="unknown slot 'foo', valid names: activation, attention, block"):
        register("foo", "bar")
    for slot in ("callbacks", "callback"):
        with pytest.raises(
            ConfigError, match=f"unknown slot '{slot}': .* `from recipe.slots import CALLBACKS`, .*@CALLBA"
        ):
            register(slot, "bar")
    with pytest.raises(ValueError, match="norm 'layernorm' is registered twice"):
        register("norm", "layernorm")(Scale)


def test_slots_of_other_rooms_are_where_the_hint_says() -> None:
    for slot, place in ELSEWHERE.items():
        module, _, name = place.rpartition(".")
        assert getattr(importlib.import_module(module), name).slot_name == slot


class Wanting(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()


class Bare(nn.Module):
    class Config(Component):
        pass


class Alone(Bare):
    def __init__(self) -> None:
        super().__init__()


class Greedy(Bare):
    def __init__(self, config: Component, *, hidden_size: int, eps: float) -> None:
        super().__init__()


def sized(config: Component, size: int) -> None:
    pass


sized.Config = Bare.Config  # pyright: ignore[reportFunctionMemberAccess]


@pytest.mark.parametrize(
    ("slot", "entry", "node", "fault"),
    [
        ("activation", Wanting, {"mlp": {"name": "glu", "activation": "test_part"}}, r"__init__ wants 'width', which it is not given: write __init__\(self\)"),
        ("norm", Bare, {"norm": "test_part"}, r"__init__ takes no config: write __init__\(self, config, \*, hidden_size\)"),
        ("norm", Alone, {"norm": "test_part"}, r"__init__ takes no config: write __init__\(self, config, \*, hidden_size\)"),
        ("norm", Greedy, {"norm": "test_part"}, r"__init__ wants 'eps', which it is not given: write __init__\(self, config, \*, hidden_size\)"),
        ("norm", sized, {"norm": "test_part"}, r"sized wants 'size', which it is not given: write sized\(config, \*, hidden_size\)"),
        ("loss", Greedy, {"loss": "test_part"}, r"__init__ wants 'hidden_size', which it is not given: write __init__\(self, config\)"),
    ],
)  # fmt: skip
def test_an_entry_that_cannot_be_called_as_its_slot_is_names_itself_and_the_fix(
    slot: str, entry: Any, node: dict[str, Any], fault: str
) -> None:
    with registries_as_before():
        register(slot, "test_part")(entry)
        with pytest.raises(ConfigError, match=rf"^{slot}: test_part \(test_registry\.py:\d+\): {fault}"):
            build(tiny(**node))


class Picky(nn.LayerNorm):
    class Config(ModelComponent):
        def check(self, model: FlexBertConfig) -> None:
            if model.hidden_size == 48:
                raise ValueError("norm: test_picky takes no hidden_size of 48")

    def __init__(self, config: Config, *, hidden_size: int) -> None:
        super().__init__(hidden_size)


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        ("", {"norm": "test_picky"}),
        ("attention.qk_norm: ", {"attention": {"qk_norm": "test_picky"}}),
        ("attention.inner_norm: ", {"attention": {"inner_norm": "test_picky"}}),
        ("mlp.inner_norm: ", {"mlp": {"name": "mlp", "inner_norm": "test_picky"}}),
        (
            "initial_layers: mlp.inner_norm: ",
            {"initial_layers": {"count": 1, "mlp": {"name": "glu", "inner_norm": "test_picky"}}},
        ),
    ],
)
def test_rules_of_parts_of_parts_are_asked(place: str, changes: dict[str, Any]) -> None:
    if "test_picky" not in registered("norm"):
        register("norm", "test_picky")(Picky)
    with pytest.raises(ConfigError, match=f"^model: {place}norm: test_picky takes no hidden_size of 48$"):
        tiny(**changes)
    assert tiny(hidden_size=96, **changes).hidden_size == 96


class Loose(BaseModel):
    name: str


class Unasked(Component):
    def check(self, model: FlexBertConfig) -> None:
        raise ValueError("norm: never")


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        (None, "has no class Config: write"),
        (Loose, "has a Config that is no Component: write `class Config"),
        ({"eps": 1e-5}, "has a Config that is no Component: write"),
        (Unasked, "has a Config with a `check` that is never called: derive it from flexbert.config.ModelComponent"),
    ],
)
def test_entries_whose_config_would_be_skipped_are_refused(config: Any, fault: str) -> None:
    """Unknown keys and rules would pass without a word, or end in a traceback."""
    entry = type("Entry", (nn.Identity,), {} if config is None else {"Config": config})
    with pytest.raises(ValueError, match=f"^norm 'test_refused' {fault}"):
        register("norm", "test_refused")(entry)
    assert "test_refused" not in registered("norm")


@pytest.mark.parametrize(("slot", "attribute"), [("block", "needs_final_norm"), ("head", "task")])
def test_an_entry_without_the_attribute_of_its_slot_is_refused(slot: str, attribute: str) -> None:
    """It would be missed when a model is built, by a traceback."""
    entry = type("Entry", (nn.Identity,), {"Config": type("Config", (Component,), {})})
    fault = f"^{slot} 'test_refused' has no class attribute `{attribute}`: see docs/extending/{slot}.md$"
    with pytest.raises(ValueError, match=fault):
        register(slot, "test_refused")(entry)
    assert "test_refused" not in registered(slot)
