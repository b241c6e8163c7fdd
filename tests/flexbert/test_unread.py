"""Fields that no layer reads are said when a model is built; configs that hold them go on loading."""

from typing import Any

import pytest
import torch

from flexbert import FlexBertConfig, build
from tests.helpers.models import batch_of, tiny

GLOBAL = {"name": "multihead", "global_attn_every_n_layers": 1}
ROPE = {"name": "rope", "global_theta": 5000.0}
MLP = {"name": "glu", "activation": "relu"}


@pytest.mark.parametrize(
    ("changes", "without", "said"),
    [
        (
            {"attention": {**GLOBAL, "window_per_side": 2}, "position": ROPE},
            {"attention": GLOBAL, "position": ROPE},
            ["attention.window_per_side: 2, but all layers are global"],
        ),
        (
            {"attention": {"window_per_side": 2}, "position": ROPE, "num_hidden_layers": 1},
            {"position": ROPE, "num_hidden_layers": 1},
            ["attention.window_per_side: 2, but all layers are global"],
        ),
        (
            {"attention": GLOBAL, "position": {**ROPE, "local_theta": 77.0}},
            {"attention": GLOBAL, "position": ROPE},
            ["position.local_theta: 77, but all layers are global"],
        ),
        (
            {"head": {"name": "mlm", "transform": False, "activation": "relu", "dense_bias": True}},
            {"head": {"name": "mlm", "transform": False}},
            ["head.activation: relu is of the transform", "head.dense_bias: True is of the transform"],
        ),
        ({"initial_layers": {"count": 2}}, {}, ["initial_layers: 2 that differ in nothing"]),
        (
            {"initial_layers": {"count": 4, "mlp": MLP}},
            {"mlp": MLP},
            ["mlp: initial_layers covers all 4 layers"],
        ),
        (
            {"position": {"scaling": "ntk"}},
            {},
            ["position.scaling: ntk with scaling_factor 1 changes nothing"],
        ),
        (
            {"initial_layers": {"count": 1, "attention": {**GLOBAL, "window_per_side": 2}}},
            {"initial_layers": {"count": 1, "attention": GLOBAL}},
            ["initial_layers.attention.window_per_side: 2, but all layers are global"],
        ),
    ],
    ids=str,
)
def test_what_no_layer_reads_is_said(
    changes: dict[str, Any], without: dict[str, Any], said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = FlexBertConfig.from_dict(tiny(**changes).to_dict())
    plain = build(tiny(**without)).eval()
    assert caplog.messages == []
    model = build(config).eval()
    assert len(caplog.messages) == len(said)
    for message, start in zip(caplog.messages, said, strict=True):
        assert message.startswith(f"model.{start}")
    batch = batch_of((9, 70))
    assert torch.equal(model(*batch[:3]).logits, plain(*batch[:3]).logits), "it is read after all"


def test_a_local_theta_of_global_layers_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = build(tiny(attention=GLOBAL, position=ROPE), "encoder")
    model.set_rope_theta(local_theta=123.0)
    assert caplog.messages == ["local_theta: 123 is read by no layer: all of this model's are global"]
    caplog.clear()
    build(tiny(), "encoder").set_rope_theta(local_theta=123.0)
    assert caplog.messages == []
