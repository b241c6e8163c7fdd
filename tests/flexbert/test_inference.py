"""What runs another way without gradients gives the same as with them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexbert import FlexBertConfig, build
from flexbert.kernels import AttentionPlan, attend
from tests.flexbert.conftest import ODD_LENGTHS, batch_of, tiny
from tests.flexbert.kernels.cases import LENGTHS, TOLERANCE, detached, qkv_of


@pytest.mark.parametrize("window", [(1, 1), (7, 7), (31, 31), (33, 33), (64, 64), (100, 100)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_windows_equal_eager(lengths: tuple[int, ...], window: tuple[int, int]) -> None:
    tensors = detached(qkv_of(sum(lengths)))
    plan = AttentionPlan(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths, default=0), sum(lengths))
    ours, expected = (attend(*tensors, plan, window_size=window, backend=backend) for backend in ("tiled", "eager"))
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["modernbert-tiny", "tiny"])
def test_whole_models(name: str) -> None:
    config = tiny() if name == "tiny" else FlexBertConfig.from_yaml(name)
    model = build(config).eval()
    ids, cu_seqlens, max_seqlen, _ = batch_of(ODD_LENGTHS)
    expected = model(ids, cu_seqlens, max_seqlen).logits
    assert expected is not None
    with torch.inference_mode():
        logits = model(ids, cu_seqlens, max_seqlen).logits
    torch.testing.assert_close(logits, expected.detach(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("mlp", ["glu", "mlp"])
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu", "gelu_tanh", "identity"])
@pytest.mark.parametrize("options", [{}, {"in_bias": True}, {"activated_half": "second"}], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 77])
def test_mlps(mlp: str, activation: str, options: dict[str, Any], tokens: int) -> None:
    if mlp == "mlp":
        options = {key: value for key, value in options.items() if key != "activated_half"}
    module: Any = build(tiny(mlp={"name": mlp, "activation": activation, **options})).encoder.layers[1].mlp
    states = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(0))
    before = states.clone()
    expected = module(states).detach()
    with torch.inference_mode():
        torch.testing.assert_close(module(states), expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(states, before)


class _Scaled(nn.Module):
    """An adapter as libraries put them in the place of a layer: it does more, and may show the layer's weight."""

    def __init__(self, layer: nn.Linear, shows: bool) -> None:
        super().__init__()
        self.layer = layer
        if shows:
            self.weight, self.bias = layer.weight, layer.bias

    def forward(self, states: Tensor, *arguments: Any) -> Tensor:
        return _scaled(self.layer(states, *arguments))


def _scaled(outputs: Tensor) -> Tensor:
    return outputs * torch.linspace(1, 1.5, outputs.shape[-1])


@pytest.mark.parametrize("mlp", ["glu", "mlp"])
@pytest.mark.parametrize("shows", [False, True], ids=["hides weight", "shows weight"])
def test_adapters_and_hooks_on_layers_are_never_passed_by(mlp: str, shows: bool) -> None:
    ids, cu_seqlens, max_seqlen, _ = batch_of(ODD_LENGTHS)
    models = [build(tiny(mlp=mlp)).eval() for _ in range(3)]
    calls = []
    for adapted, hooked, changed in zip(*(model.encoder.layers for model in models), strict=True):
        adapted.mlp.Wi, adapted.attn.Wqkv = _Scaled(adapted.mlp.Wi, shows), _Scaled(adapted.attn.Wqkv, shows)
        for layer in (hooked.mlp.Wi, hooked.attn.Wqkv):
            layer.register_forward_hook(lambda _, __, outputs: calls.append(1) or _scaled(outputs))
        for parameter in (*changed.mlp.Wi.parameters(), *changed.attn.Wqkv.parameters()):
            parameter.data = _scaled(parameter.data.T).T.contiguous()
    with torch.inference_mode():
        outputs = [model(ids, cu_seqlens, max_seqlen).logits for model in models]
    assert len(calls) == 2 * len(models[1].encoder.layers)
    for found in outputs[:2]:
        torch.testing.assert_close(found, outputs[2], atol=2e-5, rtol=1e-4)
