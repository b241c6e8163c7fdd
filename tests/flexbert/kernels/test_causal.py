"""Causal attention: the reference is a loop that looks at nothing behind a token, every kernel is the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flexbert.kernels import AttentionPlan, attend
from flexbert.kernels.cpu import tiles
from tests.flexbert.kernels.cases import LENGTHS, SLOPES, TOLERANCE, detached, qkv_of
from tests.helpers.models import ODD_LENGTHS

WINDOWS = [-1, 1, 7, 64, 100]


def plan_of(lengths: tuple[int, ...], causal: bool = True) -> AttentionPlan:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return AttentionPlan(bounds, max(lengths, default=0), sum(lengths), causal)


def run(backend: Any, lengths: tuple[int, ...], side: int, slopes: Tensor | None = None) -> list[Tensor]:
    """Output and gradients of queries, keys, values."""
    tensors = qkv_of(sum(lengths))
    out = attend(*tensors, plan_of(lengths), window_size=(side, side), alibi_slopes=slopes, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad((out * weights).sum(), tensors)]


@pytest.mark.parametrize("side", [-1, 2])
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
def test_reference_equals_a_loop(side: int, slopes: Tensor | None) -> None:
    queries, keys, values = qkv_of(15)
    rows = []
    for first, length in ((0, 1), (1, 5), (6, 9)):
        for place in range(length):
            seen = range(0 if side < 0 else max(0, place - side), place + 1)
            heads = []
            for head in range(2):
                scores = torch.stack([queries[first + place, head] @ keys[first + key, head] / 4 for key in seen])
                if slopes is not None:
                    scores = scores - slopes[head] * torch.tensor([place - key for key in seen])
                heads.append(scores.softmax(0) @ torch.stack([values[first + key, head] for key in seen]))
            rows.append(torch.stack(heads))
    expected = torch.stack(rows)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    references = [expected, *torch.autograd.grad((expected * weights).sum(), (queries, keys, values))]
    for ours, reference in zip(run("eager", (1, 5, 0, 9), side, slopes), references, strict=True):
        torch.testing.assert_close(ours, reference, atol=2e-6, rtol=0)


@pytest.mark.parametrize("side", WINDOWS)
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_sdpa_equals_eager(lengths: tuple[int, ...], side: int, slopes: Tensor | None) -> None:
    for ours, expected in zip(run("sdpa", lengths, side, slopes), run("eager", lengths, side, slopes), strict=True):
        torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("side", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("tile", [2**22, 2**13], ids=["whole", "cut"])
def test_tiled_equals_eager(lengths: tuple[int, ...], side: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_BYTES", tile)
    for ours, expected in zip(run("tiled", lengths, side), run("eager", lengths, side), strict=True):
        torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("side", [-1, 7])
def test_flex_equals_eager(side: int) -> None:
    """The same call that a device compiles; uncompiled, and forward only, on the CPU."""
    from flexbert.kernels.gpu import flex

    tensors = detached(qkv_of(sum(ODD_LENGTHS)))
    out = flex(*tensors, plan_of(ODD_LENGTHS), (side, 0), None, 0.0)
    expected = attend(*tensors, plan_of(ODD_LENGTHS), window_size=(side, side), backend="eager")
    torch.testing.assert_close(out, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "tiled"])
@pytest.mark.parametrize("side", [-1, 30, 64])
def test_no_bit_comes_from_behind_a_token_or_beyond_its_window(backend: Any, side: int) -> None:
    queries, keys, values = detached(qkv_of(400))
    place = 150
    plan = plan_of((300, 100))

    def seen(key: int) -> bool:
        changed = values.clone()
        changed[key] += 1
        before, after = (
            attend(queries, keys, each, plan, window_size=(side, side), backend=backend) for each in (values, changed)
        )
        return not torch.equal(before[place], after[place])

    edges = {place: True, place + 1: False, 299: False, 300: False}
    edges |= {0: True} if side < 0 else {place - side: True, place - side - 1: False}
    assert {key: seen(key) for key in edges} == edges


@pytest.mark.parametrize("backend", ["eager", "sdpa", "tiled"])
@pytest.mark.parametrize("side", [-1, 7])
def test_bfloat16_errs_by_its_own_rounding(backend: Any, side: int) -> None:
    lengths, found = (500, 20, 31, 1), []
    for name, dtype in ((backend, torch.bfloat16), ("eager", torch.float64)):
        tensors = [t.detach().bfloat16().to(dtype).requires_grad_() for t in qkv_of(sum(lengths))]
        out = attend(*tensors, plan_of(lengths), window_size=(side, side), backend=name)  # pyright: ignore
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
        found.append([out, *torch.autograd.grad((out * weights).sum(), tensors)])
    for ours, exact in zip(*found, strict=True):
        assert (ours.double() - exact).norm() < 0.015 * exact.norm()  # as of both sides


@pytest.mark.parametrize("backend", ["eager", "sdpa", "tiled"])
@pytest.mark.parametrize("side", [-1, 7])
def test_some_queries_and_shared_heads(backend: Any, side: int) -> None:
    lengths = (30, 5, 0, 41)
    queries, keys, values = qkv_of(76, heads=6)
    few_keys, few_values = (x[:, :2].detach() for x in (keys, values))
    wanted = torch.tensor([0, 3, 29, 30, 50, 75])
    heads = torch.tensor([0, 0, 0, 1, 1, 1])
    ours = attend(
        queries, few_keys, few_values, plan_of(lengths), window_size=(side, side), backend=backend, wanted=wanted
    )
    whole = attend(
        queries, keys[:, heads], values[:, heads], plan_of(lengths), window_size=(side, side), backend="eager"
    )
    torch.testing.assert_close(ours, whole[wanted], atol=TOLERANCE, rtol=0)
