"""What runs another way without gradients gives the same as with them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexbert import FlexBertConfig, build
from flexbert.kernels import attend
from flexbert.mlps import GatedLinearUnit
from flexbert.plan import AttentionPlan
from tests.flexbert.conftest import ODD_LENGTHS, batch_of, tiny
from tests.flexbert.test_kernels import LENGTHS, SLOPES, TOLERANCE, detached, qkv_of

GATES: dict[str, dict[str, Any]] = {
    "gelu": {},
    "bias": {"in_bias": True},
    "second": {"activated_half": "second", "in_bias": True, "activation": "silu"},
    "norm": {"inner_norm": "layernorm"},
}


@pytest.mark.parametrize("window", [(1, 1), (7, 7), (31, 31), (33, 33), (64, 64), (100, 100)], ids=str)
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_windows_equal_eager(lengths: tuple[int, ...], slopes: Tensor | None, window: tuple[int, int]) -> None:
    tensors = detached(qkv_of(sum(lengths)))
    plan = AttentionPlan(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths, default=0), sum(lengths))
    ours, expected = (
        attend(*tensors, plan, window_size=window, alibi_slopes=slopes, backend=backend)
        for backend in ("sdpa", "eager")
    )
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)


def glu(gate: str) -> GatedLinearUnit:
    """Of width 48 and 40, with biases that are not 0."""
    mlp: Any = build(tiny(mlp={"name": "glu", **GATES[gate]}), "encoder").layers[0].mlp
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return mlp


@pytest.mark.parametrize("tokens", [0, 1, 5, 129])
@pytest.mark.parametrize("gate", GATES)
def test_gated_mlps(gate: str, tokens: int) -> None:
    mlp, states = glu(gate), torch.randn(tokens, 48, generator=torch.Generator().manual_seed(1))
    expected = mlp(states)
    with torch.no_grad():
        torch.testing.assert_close(mlp(states), expected.detach(), atol=1e-5, rtol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mlp(states).float(), expected.detach(), atol=0.2, rtol=0.05)


def test_who_looks_at_the_inner_projection_sees_both_halves() -> None:
    mlp, states, seen = glu("gelu"), torch.randn(3, 48), list[torch.Size]()
    mlp.Wi.register_forward_hook(lambda _, __, output: seen.append(output.shape))
    with torch.no_grad():
        mlp(states)
    assert seen == [torch.Size([3, 80])]


def test_an_adapter_in_place_of_the_inner_projection_acts() -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

        def forward(self, states: Tensor) -> Tensor:
            return 2 * self.inner(states)

    mlp, states = glu("gelu"), torch.randn(3, 48)
    mlp.Wi = Doubled(mlp.Wi)  # pyright: ignore[reportAttributeAccessIssue]
    expected = mlp(states).detach()
    with torch.no_grad():
        torch.testing.assert_close(mlp(states), expected)


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
