"""A component written outside the package works from YAML at once."""

from pathlib import Path

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from flexbert import FlexBertConfig, build, register, registered
from flexbert.layers import OutputProjection
from schema import Component, ConfigError
from tests.flexbert.conftest import batch_of, gradients


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


def test_a_new_norm_and_mlp_train_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(
        "vocab_size: 97\nhidden_size: 32\nnum_hidden_layers: 2\nnum_attention_heads: 2\nintermediate_size: 64\n"
        "norm: {name: test_scale, start: 4}\nmlp: test_relu\n"
    )
    config = FlexBertConfig.from_yaml(path)
    assert FlexBertConfig.from_dict(config.to_dict()) == config
    model = build(config)
    assert isinstance(model.get_submodule("encoder.layers.1.mlp"), Relu)
    assert isinstance(model.encoder.final_norm, Scale)
    assert (model.encoder.final_norm.scale == 4).all()
    assert not model.get_parameter("encoder.layers.0.mlp.first.bias").any(), (
        "the init slot did not reach the new component"
    )
    batch = batch_of((5, 40))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = model(*batch).loss
    assert first is not None
    first.backward()
    gradients(model)
    optimizer.step()
    second = model(*batch).loss
    assert second is not None
    assert second < first


def test_registered_lists_names_and_register_guards_them() -> None:
    assert {"layernorm", "test_scale"} <= set(registered("norm"))
    assert registered("mlp") == sorted(registered("mlp"))
    with pytest.raises(ConfigError, match=r"unknown slot 'norms', did you mean 'norm'\?"):
        registered("norms")
    with pytest.raises(ConfigError, match="unknown slot 'foo', valid names: activation, attention, block"):
        register("foo", "bar")
    with pytest.raises(ValueError, match="norm 'layernorm' is registered twice"):
        register("norm", "layernorm")(Scale)
