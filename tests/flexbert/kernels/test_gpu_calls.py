"""What flash-attn and FlexAttention are called with, by stand-ins of their signatures that compute in plain steps."""

import functools
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flexbert import build
from flexbert.kernels import (
    AttentionPlan,
    attend,
    choose_backend,
    gpu,
    is_deterministic,
    require_backend,
    set_deterministic,
)
from flexbert.kernels.attention import KERNELS
from flexbert_core.schema import ConfigError
from tests.flexbert.kernels.cases import LENGTHS, SLOPES, TOLERANCE, detached, qkv_of
from tests.helpers.models import ODD_LENGTHS, batch_of, tiny


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window_size: tuple[int, int],
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """What flash-attn's variable-length functions compute, in plain steps, inside in float32."""
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.float16, torch.bfloat16)
    dtype, (q, k, v) = q.dtype, (x.float() for x in (q, k, v))
    assert q.shape[1] % k.shape[1] == 0
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = torch.zeros_like(q)
    for first, last in itertools.pairwise(cu_seqlens.tolist()):
        scores = torch.einsum("qnh,knh->nqk", q[first:last], k[first:last]) * q.shape[-1] ** -0.5
        places = torch.arange(last - first)
        offset = places[None, :] - places[:, None]  # key minus query
        if alibi_slopes is not None:
            assert alibi_slopes.dtype == torch.float32
            scores = scores - alibi_slopes[:, None, None] * offset.abs()
        if window_size != (-1, -1):
            scores = scores.masked_fill((offset < -window_size[0]) | (offset > window_size[1]), float("-inf"))
        out[first:last] = torch.einsum("nqk,knh->qnh", scores.softmax(-1), v[first:last])
    return out.to(dtype)


DROPPED: list[float] = []
"""The dropout that each call of the stand-in was given."""


def _flash2_stand_in(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """flash_attn 2.8.3's signature."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert isinstance(max_seqlen_q, int)
    assert min(max_seqlen_q, max_seqlen_k) >= cu_seqlens_q.diff().max()
    assert not causal
    assert not return_attn_probs
    assert deterministic is is_deterministic()
    assert softcap == 0.0
    DROPPED.append(dropout_p)
    assert softmax_scale is block_table is None
    return _varlen(q, k, v, cu_seqlens_q, window_size, alibi_slopes)


def _flash3_stand_in(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Tensor:
    """The signature of hopper/flash_attn_interface.py."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert isinstance(max_seqlen_q, int)
    assert min(max_seqlen_q, max_seqlen_k) >= cu_seqlens_q.diff().max()
    assert not causal
    assert not return_attn_probs
    assert deterministic is is_deterministic()
    assert softcap == attention_chunk == 0
    assert seqused_q is seqused_k is softmax_scale is qv is None
    return _varlen(q, k, v, cu_seqlens_q, window_size)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn needs CUDA: in its place functions of its signatures and meaning, on a CPU that passes for an H100."""
    monkeypatch.setattr(gpu, "installed", lambda package: True)
    repeats = functools.partial(gpu.flash3_repeats.__wrapped__, "cpu")
    monkeypatch.setattr(gpu, "flash3_repeats", functools.cache(repeats))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    real = gpu.why_not
    monkeypatch.setattr(gpu, "why_not", lambda backend, _, *rest: real(backend, "cuda", *rest))
    for name, function in (("flash_attn", _flash2_stand_in), ("flash_attn_interface", _flash3_stand_in)):
        module: Any = types.ModuleType(name)
        module.flash_attn_varlen_func = function
        monkeypatch.setitem(sys.modules, name, module)
    DROPPED.clear()


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize("kv_heads", [pytest.param(2, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
@pytest.mark.parametrize("window", [(-1, -1), (64, 64)], ids=str)
@pytest.mark.parametrize("backend", ["flash2", "flash3"])
def test_flash_attn_is_called_by_its_signature(
    backend: Any, window: tuple[int, int], slopes: Tensor | None, kv_heads: int
) -> None:
    if backend == "flash3" and slopes is not None:
        pytest.skip("flash-attn 3 has no ALiBi: refused, see test_attention.py")
    found = []
    for name, dtype in ((backend, torch.bfloat16), ("eager", torch.float32)):
        queries, keys, values = (t.detach().bfloat16().to(dtype) for t in qkv_of(sum(ODD_LENGTHS)))
        tensors = [t.requires_grad_() for t in (queries, keys[:, :kv_heads], values[:, :kv_heads])]
        plan = AttentionPlan(torch.tensor([0, *ODD_LENGTHS]).cumsum(0).int(), max(ODD_LENGTHS), sum(ODD_LENGTHS))
        out = attend(*tensors, plan, window_size=window, alibi_slopes=slopes, backend=name)  # pyright: ignore
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
        found.append([out, *torch.autograd.grad((out * weights).sum(), tensors)])
    for ours, expected in zip(*found, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - expected).norm() < 0.005 * expected.norm()  # rounded once
    assert ([0.0] if backend == "flash2" else []) == DROPPED


@pytest.mark.usefixtures("flash_attn")
def test_flash_attn_gets_the_dropout_and_only_half_precision() -> None:
    plan = AttentionPlan(torch.tensor([0, 3, 9], dtype=torch.int32), 6, 9)
    for dtype in (torch.bfloat16, torch.float16):
        tensors = detached(qkv_of(9), dtype)
        attend(*tensors, plan, window_size=(-1, -1), dropout_p=0.25, backend="flash2")
        with pytest.raises(ConfigError, match="flash-attn 3 has no dropout of attention weights"):
            attend(*tensors, plan, window_size=(-1, -1), dropout_p=0.25, backend="flash3")
    assert DROPPED == [0.25, 0.25]
    for backend, dtype in itertools.product(("flash2", "flash3"), (torch.float32, torch.float64)):
        with pytest.raises(ConfigError, match=f"computes in bfloat16 or float16, not {dtype}"):
            attend(*detached(qkv_of(9), dtype), plan, window_size=(-1, -1), backend=backend)  # pyright: ignore
    with torch.autocast("cpu", torch.bfloat16):  # norms of queries and keys leave them in float32
        out = attend(*detached(qkv_of(9)), plan, window_size=(-1, -1), backend="flash2")
    assert out.dtype == torch.bfloat16
    model = build(tiny(attention={"backend": "flash2", "probs_dropout": 0.5})).bfloat16()
    DROPPED.clear()
    model(*batch_of((5, 9))[:3])
    assert DROPPED == [0.5] * 4
    model.eval()(*batch_of((5, 9))[:3])
    assert DROPPED[4:] == [0.0] * 4


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
@pytest.mark.parametrize("window", [(-1, -1), (7, 7), (64, 64)], ids=str)
@pytest.mark.parametrize(
    "lengths", [LENGTHS[0], (1,), (128,), (129, 1, 0), (500, 20, 480, 20, 20, 31, 33, 370)], ids=str
)
def test_flex_mask_and_bias(
    lengths: tuple[int, ...], window: tuple[int, int], slopes: Tensor | None, kv_heads: int
) -> None:
    """FlexAttention's kernel needs CUDA; the same call runs uncompiled here, forward and backward. That dense path looks
    at the mask function, so which tiles are visited is held against it too."""
    total = sum(lengths)
    tensors = qkv_of(total)
    few = [
        tensor.detach()[:, :heads].requires_grad_()
        for tensor, heads in zip(tensors, (2, kv_heads, kv_heads), strict=True)
    ]
    found = []
    for backend in ("flex", "eager"):
        plan = AttentionPlan(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths), total)
        keys, values = (x if backend == "flex" else x.repeat_interleave(2 // kv_heads, 1) for x in few[1:])
        out = KERNELS[backend](few[0], keys, values, plan, window, slopes, 0.0)
        found.append([out, *torch.autograd.grad(out.square().sum(), few)])
        if backend == "flex":
            mask = plan.flex_masks[window]
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)
    side = len(mask.kv_num_blocks[0, 0]) * 128
    needed = torch.zeros(side, side, dtype=torch.bool)
    needed[:total, :total] = plan.dense_visible(window)
    needed = needed.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), needed)


@pytest.fixture
def any_order() -> Iterator[None]:
    """Bits need not repeat."""
    set_deterministic(False)
    yield
    set_deterministic(True)


class _Atomic(torch.autograd.Function):
    """What flash-attn 3 up to 2.8.3 does: its gradient's sums come in another order each time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * (1 + 2**-7 * torch.randint(2, gradients[0].shape))


def _unordered(q: Tensor, *others: Any, **named: Any) -> Tensor:
    return _flash3_stand_in(_Atomic.apply(q), *others, **named)  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("flash_attn")
def test_a_flash_attn_3_that_does_not_repeat_its_bits_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["flash_attn_interface"], "flash_attn_varlen_func", _unordered)
    assert choose_backend("cuda", torch.bfloat16, head_dim=24) == "flash2"
    plan = AttentionPlan(torch.tensor([0, 3, 9], dtype=torch.int32), 6, 9)
    with pytest.raises(ConfigError, match=r"flash3 cannot run: .* in another order each time .*deterministic=false"):
        attend(*detached(qkv_of(9), torch.bfloat16), plan, window_size=(-1, -1), backend="flash3")


def _recomputed(ask: Callable[[], bool]) -> bool:
    found = []

    def block(x: Tensor) -> Tensor:
        found.append(ask())
        return x.sin()

    checkpoint(block, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()  # pyright: ignore
    return found[0]


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize("where", ["no gradients", "inference", "recomputed"])
def test_flash_attn_3_is_tried_wherever_it_is_asked_for_first(where: str) -> None:
    def ask() -> bool:
        return gpu.flash3_repeats(tries=1)

    if where == "recomputed":
        assert _recomputed(ask)
        return
    with torch.no_grad() if where == "no gradients" else torch.inference_mode():
        assert ask()


@pytest.mark.usefixtures("flash_attn", "any_order")
def test_without_determinism_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """And flash-attn is told so."""
    monkeypatch.setattr(sys.modules["flash_attn_interface"], "flash_attn_varlen_func", _unordered)
    assert choose_backend("cuda", torch.bfloat16, head_dim=40) == "flash3"
    plan = AttentionPlan(torch.tensor([0, 3, 9], dtype=torch.int32), 6, 9)
    for backend in ("flash2", "flash3"):
        attend(*detached(qkv_of(9), torch.bfloat16), plan, window_size=(-1, -1), backend=backend)  # pyright: ignore


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize(
    ("capability", "head_dim", "message"),
    [
        ((10, 0), 64, "flash-attn 3 has code for compute capability 9.0 .H100. only, not 10.0"),
        ((8, 0), 64, "flash-attn 3 needs compute capability 9.0 .H100., not 8.0"),
        ((9, 0), 200, "flash-attn 3 has heads of at most 192, not 200"),
    ],
    ids=str,
)
def test_flash_attn_3_is_for_hopper_and_heads_up_to_192(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], head_dim: int, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(ConfigError, match=message):
        require_backend("flash3", "cuda", torch.bfloat16, head_dim=head_dim)
