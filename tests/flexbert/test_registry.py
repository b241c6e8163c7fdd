"""A component of any kind, written outside the package, works from YAML at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Tensor, nn

from flexbert import FlexBertConfig, build, register, registered
from flexbert.config import ModelComponent
from flexbert.heads import Head, TaskConfig, TaskHead
from flexbert.kernels import AttentionPlan
from flexbert.layers import OutputProjection
from flexbert.losses import TokenScores
from flexbert.positions import Position, Positions
from flexbert.registry import ATTENTIONS, MLPS, SLOTS
from flexbert_core.schema import Component, ConfigError
from tests.helpers.models import batch_of, gradients, tiny


@register("norm", "test_scale")
class Scale(nn.Module):
    class Config(Component):
        start: float = Field(1.0, gt=0)

    def __init__(self, config: Config, *, hidden_size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((hidden_size,), config.start))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.scale / hidden_states.norm(dim=-1, keepdim=True).clamp_min(1e-3)


@register("mlp", "test_relu")
class Relu(nn.Module):
    class Config(Component):
        pass

    def __init__(self, config: Config, *, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.first = nn.Linear(hidden_size, intermediate_size)
        self.second = OutputProjection(intermediate_size, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.second(self.first(hidden_states).relu())


@register("activation", "test_sine")
def sine(states: Tensor) -> Tensor:
    return states.sin()


@register("embedding", "test_bigram")
class Bigram(nn.Module):
    class Config(Component):
        buckets: int = Field(64, ge=1)

    def __init__(self, config: Config, *, model: FlexBertConfig) -> None:
        super().__init__()
        self.buckets = config.buckets
        self.tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        self.bigrams = nn.Embedding(config.buckets, model.hidden_size)

    def forward(self, input_ids: Tensor, added: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        pairs = (input_ids * 31 + input_ids.roll(1)) % self.buckets
        states = self.tokens(input_ids) + self.bigrams(pairs)
        return states if added is None else states + added


@register("position", "test_ramp")
class Ramp(Position):
    class Config(Component):
        slope: float = Field(0.01, gt=0)

    def __init__(self, config: Config, *, model: FlexBertConfig) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.full((model.hidden_size,), config.slope))

    def embed(self, position_ids: Tensor, max_seqlen: int) -> Tensor:
        return position_ids[:, None] * self.direction


@register("attention", "test_mean")
class MeanOfSequence(nn.Module):
    class Config(Component):
        pass

    def __init__(self, config: Config, *, hidden_size: int, num_attention_heads: int, layer_index: int) -> None:
        super().__init__()
        self.out = OutputProjection(hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor, plan: AttentionPlan, positions: Positions) -> Tensor:
        same = plan.dense_visible((-1, -1)).to(hidden_states)
        return self.out(same @ hidden_states / same.sum(1, keepdim=True))


@register("block", "test_gated")
class Gated(nn.Module):
    needs_final_norm = True

    class Config(Component):
        pass

    def __init__(self, config: Config, *, model: FlexBertConfig, layer_index: int) -> None:
        super().__init__()
        sizes = {"hidden_size": model.hidden_size}
        self.gate = nn.Parameter(torch.ones(2))
        heads = model.num_attention_heads
        self.attn = ATTENTIONS.build(model.attention, **sizes, num_attention_heads=heads, layer_index=layer_index)
        self.mlp = MLPS.build(model.mlp, **sizes, intermediate_size=model.intermediate_size)

    def forward(self, hidden_states: Tensor, plan: AttentionPlan, positions: Positions) -> Tensor:
        hidden_states = hidden_states + self.gate[0] * self.attn(hidden_states, plan, positions)
        return hidden_states + self.gate[1] * self.mlp(hidden_states)


@register("head", "test_narrow")
class Narrow(Head):
    class Config(Component):
        width: int = Field(8, ge=1)

    def __init__(self, config: Config, *, model: FlexBertConfig) -> None:
        super().__init__()
        self.down = nn.Linear(model.hidden_size, config.width)
        self.up = nn.Linear(config.width, model.vocab_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down(hidden_states)

    def decoder(self, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.up.weight, self.up.bias


@register("head", "test_last")
class LastToken(TaskHead):
    task = "classification"

    class Config(TaskConfig):
        pass

    def __init__(self, config: Config, *, model: FlexBertConfig) -> None:
        super().__init__()
        self.classifier = nn.Linear(model.hidden_size, config.num_labels)

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.classifier(hidden_states[cu_seqlens[1:].long() - 1])


@register("loss", "test_focal")
class Focal:
    class Config(Component):
        gamma: float = Field(2.0, ge=0)

    def __init__(self, config: Config) -> None:
        self.gamma = config.gamma

    def __call__(
        self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scores: TokenScores
    ) -> Tensor:
        logits = F.linear(hidden_states, weight, bias)
        nll = F.cross_entropy(logits, targets, reduction="none")
        scores.losses.copy_(nll.detach())
        scores.hits.copy_(logits.argmax(1) == targets)
        return ((1 - torch.exp(-nll)) ** self.gamma * nll).sum()


@register("init", "test_constant")
class Constant:
    class Config(Component):
        value: float = Field(0.5)

    def __init__(self, config: Config, *, num_hidden_layers: int) -> None:
        self.value = config.value

    def __call__(self, module: nn.Module, seed: int, prefix: str = "") -> None:
        for child in module.modules():
            if isinstance(child, nn.Linear) and not child.weight.is_meta:
                nn.init.eye_(child.weight)
                child.weight.data.mul_(self.value)


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
    with pytest.raises(ValueError, match="norm 'layernorm' is registered twice"):
        register("norm", "layernorm")(Scale)


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
