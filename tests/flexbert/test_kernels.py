"""Every kernel equals the eager reference, and the reference equals a loop."""

import itertools
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from flexbert import build, kernels_cpu, kernels_gpu
from flexbert.kernels import _KERNELS, attend, choose_backend, require_backend
from flexbert.plan import AttentionPlan
from schema import ConfigError
from tests.flexbert.conftest import ODD_LENGTHS, batch_of, gradients, tiny

# Measured worst case over all cases here: 3.0e-6 (8192 keys), else 1.2e-6, on values up to 6.5.
TOLERANCE = 1e-5

LENGTHS = [
    ODD_LENGTHS,
    (1,),
    (64,),
    (65,),
    (127, 128, 129),
    (128, 128, 128),
    (0, 5, 0, 0, 100, 0),
    (300,),
    (3,) * 50,
    (500, 20, 480, 20, 20, 31, 33, 370),
    (),
    (0,),
    (0, 0),
]


QKV = tuple[Tensor, Tensor, Tensor]


def qkv_of(total: int, heads: int = 2, dim: int = 16, seed: int = 0) -> QKV:
    generator = torch.Generator().manual_seed(seed)
    queries, keys, values = torch.randn(3, total, heads, dim, generator=generator).unbind()
    return queries.clone().requires_grad_(), keys.clone().requires_grad_(), values.clone().requires_grad_()


def detached(tensors: QKV, dtype: torch.dtype = torch.float32, device: str = "cpu") -> QKV:
    queries, keys, values = (tensor.detach().to(device, dtype) for tensor in tensors)
    return queries, keys, values


SLOPES = torch.tensor([0.25, 0.0625])


def run(backend: Any, lengths: tuple[int, ...], window: tuple[int, int], slopes: Tensor | None = None) -> list[Tensor]:
    """Output and gradients of queries, keys, values."""
    tensors = qkv_of(sum(lengths))
    plan = AttentionPlan(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths, default=0), sum(lengths))
    out = attend(*tensors, plan, window_size=window, alibi_slopes=slopes, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    return [out, *(tensor.grad for tensor in tensors)]  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
def test_reference_equals_a_loop(slopes: Tensor | None) -> None:
    lengths, (left, right) = (1, 5, 0, 9), (2, 2)
    queries, keys, values = detached(qkv_of(15))
    expected = torch.zeros_like(queries)
    for first, length in ((0, 1), (1, 5), (6, 9)):
        for head in range(2):
            for place in range(length):
                seen = range(max(0, place - left), min(length, place + right + 1))
                scores = torch.stack([queries[first + place, head] @ keys[first + key, head] / 4 for key in seen])
                if slopes is not None:
                    scores = scores - slopes[head] * torch.tensor([abs(place - key) for key in seen])
                seen_values = torch.stack([values[first + key, head] for key in seen])
                expected[first + place, head] = scores.softmax(0) @ seen_values
    torch.testing.assert_close(run("eager", lengths, (2, 2), slopes)[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("window", [(-1, -1), (1, 1), (7, 7), (64, 64), (100, 100)], ids=str)
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_sdpa_equals_eager(lengths: tuple[int, ...], window: tuple[int, int], slopes: Tensor | None) -> None:
    pairs = zip(run("sdpa", lengths, window, slopes), run("eager", lengths, window, slopes), strict=True)
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("window", [(-1, -1), (1, 1), (7, 7), (64, 64), (100, 100)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("tile", [2**21, 2**11], ids=["whole", "cut"])
def test_tiled_equals_eager(
    lengths: tuple[int, ...], window: tuple[int, int], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The smaller tile cuts heads, queries and blocks apart, as the larger does in batches of thousands of tokens.
    monkeypatch.setattr(kernels_cpu, "_TILE", tile)
    pairs = zip(run("tiled", lengths, window), run("eager", lengths, window), strict=True)
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("window", [(-1, -1), (64, 64)], ids=str)
def test_tiled_in_bfloat16_errs_as_plain_products_do(window: tuple[int, int]) -> None:
    """Forward and backward, against float64; eager in bfloat16 is the same sum of plain products."""
    lengths = (500, 20, 480, 20, 20, 31, 33, 370)
    plan = AttentionPlan(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths), sum(lengths))
    tensors = detached(qkv_of(sum(lengths), dim=64), torch.bfloat16)

    def outputs(backend: Any, dtype: torch.dtype) -> list[Tensor]:
        given = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        out = attend(given[0], given[1], given[2], plan, window_size=window, backend=backend)
        assert out.dtype == dtype
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return [out, *torch.autograd.grad((out * weights).sum(), given)]

    exact = outputs("sdpa", torch.float64)
    errors = [
        [float((found.double() - right).norm() / right.norm()) for found, right in zip(found, exact, strict=True)]
        for found in (outputs("tiled", torch.bfloat16), outputs("eager", torch.bfloat16))
    ]
    for ours, plain in zip(*errors, strict=True):
        assert ours < 1.25 * plain  # measured: 0.9 to 1.1 of it, 0.003 to 0.005


@pytest.mark.parametrize("backend", ["eager", "sdpa", "tiled"])
@pytest.mark.parametrize("window", [(-1, -1), (7, 7)], ids=str)
@pytest.mark.parametrize("lengths", [ODD_LENGTHS, (0, 5, 0), ()], ids=str)
def test_shared_key_value_heads_are_repeated_ones(backend: Any, window: Any, lengths: tuple[int, ...]) -> None:
    total = sum(lengths)
    queries, keys, values = qkv_of(total, heads=6)
    few_keys, few_values = (x[:, :2].detach().requires_grad_() for x in (keys, values))
    plan = AttentionPlan(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths, default=0), total)
    heads = torch.tensor([0, 0, 0, 1, 1, 1])
    ours = attend(queries, few_keys, few_values, plan, window_size=window, backend=backend)
    expected = attend(queries, keys[:, heads], values[:, heads], plan, window_size=window, backend="eager")
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)
    ours.square().sum().backward()
    expected.square().sum().backward()
    assert few_keys.grad is not None
    assert keys.grad is not None
    torch.testing.assert_close(few_keys.grad, keys.grad[:, :2], atol=TOLERANCE, rtol=0)


def test_whole_model_agrees_between_backends() -> None:
    batch = batch_of(ODD_LENGTHS)
    models = [build(tiny(attention={"backend": name})) for name in ("eager", "sdpa")]
    losses = [model(*batch).loss for model in models]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], atol=TOLERANCE, rtol=0)
    expected = gradients(models[0])
    for name, gradient in gradients(models[1]).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=0)  # measured 6e-8 of up to 0.1


def test_one_document_of_8192_tokens() -> None:
    # One narrow head: the reference's scores alone are 256 MiB
    tensors = qkv_of(8192, heads=1, dim=8)
    plan = AttentionPlan(torch.tensor([0, 8192], dtype=torch.int32), 8192, 8192)
    with torch.no_grad():
        for window, slopes in itertools.product(((-1, -1), (64, 64)), (None, SLOPES[:1])):
            expected = attend(*tensors, plan, window_size=window, alibi_slopes=slopes, backend="eager")
            for backend in ("sdpa", "tiled") if slopes is None else ("sdpa",):
                ours = attend(*tensors, plan, window_size=window, alibi_slopes=slopes, backend=backend)
                torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "tiled"])
@pytest.mark.parametrize("per_side", [1, 30, 64, 90])
def test_window_edge_is_exact_to_one_token(backend: Any, per_side: int) -> None:
    plan = AttentionPlan(torch.tensor([0, 300, 400], dtype=torch.int32), 300, 400)
    queries, keys, values = detached(qkv_of(400))
    place = 150

    def seen(key: int) -> bool:
        changed = values.clone()
        changed[key] += 1
        before = attend(queries, keys, values, plan, window_size=(per_side, per_side), backend=backend)
        after = attend(queries, keys, changed, plan, window_size=(per_side, per_side), backend=backend)
        return not torch.equal(before[place], after[place])

    edges = {place - per_side - 1: False, place - per_side: True, place + per_side: True, place + per_side + 1: False}
    assert {key: seen(key) for key in edges} == edges


@pytest.mark.parametrize("window", [(-1, -1), (64, 64)], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "tiled"])
def test_two_runs_give_the_same_bits(window: tuple[int, int], backend: str) -> None:
    lengths = (500, 20, 480, 20, 20, 31, 33, 370)
    for first, second in zip(run(backend, lengths, window), run(backend, lengths, window), strict=True):
        assert torch.equal(first, second)


def test_bfloat16_stays_bfloat16_and_close() -> None:
    plan = AttentionPlan(torch.tensor([0, 70, 200], dtype=torch.int32), 130, 200)
    tensors = detached(qkv_of(200))
    low = detached(tensors, torch.bfloat16)
    for window in ((-1, -1), (64, 64)):
        expected = attend(*tensors, plan, window_size=window, backend="eager")
        for backend in ("eager", "sdpa", "tiled"):
            out = attend(*low, plan, window_size=window, backend=backend)
            assert out.dtype == torch.bfloat16
            # bfloat16 has 8 bits: inputs are rounded by 0.4 %; measured 0.008
            torch.testing.assert_close(out.float(), expected, atol=0.03, rtol=0)


def test_auto_is_sdpa_on_cpu_and_a_named_kernel_is_never_swapped() -> None:
    assert choose_backend("cpu", torch.float32) == "sdpa"
    low = "tiled" if kernels_cpu.is_fastest(torch.bfloat16) else "sdpa"
    assert choose_backend("cpu", torch.bfloat16) == low
    assert choose_backend("cpu", torch.bfloat16, alibi=True) == "sdpa"
    assert choose_backend("cpu", torch.bfloat16, drops=True) == "sdpa"
    with pytest.raises(ConfigError, match=r"attention\.backend: flash2 cannot run: .* needs a CUDA device, not cpu"):
        run("flash2", (4,), (-1, -1))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"attention\.backend: flash2 cannot run"):
            build(tiny(attention={"backend": "flash2"}))
    if not kernels_gpu.installed("flash_attn"):
        with pytest.raises(ConfigError, match="not installed"):
            require_backend("flash2", "cuda", torch.bfloat16)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"attention": {"backend": "flash3"}, "position": "alibi"}, "flash-attn 3 has no ALiBi"),
        (
            {"attention": {"backend": "flash3", "probs_dropout": 0.1}},
            "flash-attn 3 has no dropout of attention weights",
        ),
        ({"attention": {"backend": "tiled"}, "position": "alibi"}, "the tiled kernel has no ALiBi"),
        ({"attention": {"backend": "flex", "probs_dropout": 0.1}}, "FlexAttention has no dropout of attention weights"),
    ],
)
def test_what_a_kernel_cannot_do_is_said_when_the_model_is_built(model: Any, message: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"attention\.backend: (flash3|flex|tiled) cannot run: {message}: use auto, or sdpa"
    ):
        build(tiny(**model))


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window_size: tuple[int, int],
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """What flash-attn's variable-length functions compute, in plain steps."""
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
    return out


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
    assert dropout_p == softcap == 0.0
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
    assert softcap == attention_chunk == 0
    assert seqused_q is seqused_k is softmax_scale is qv is None
    return _varlen(q, k, v, cu_seqlens_q, window_size)


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
@pytest.mark.parametrize("window", [(-1, -1), (64, 64)], ids=str)
@pytest.mark.parametrize("backend", ["flash2", "flash3"])
def test_flash_attn_is_called_by_its_signature(
    backend: str, window: tuple[int, int], slopes: Tensor | None, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flash-attn needs CUDA: in its place a function of its signature and meaning."""
    if backend == "flash3" and slopes is not None:
        pytest.skip("flash-attn 3 has no ALiBi: refused, see above")
    module: Any = types.ModuleType("stand_in")
    module.flash_attn_varlen_func = _flash2_stand_in if backend == "flash2" else _flash3_stand_in
    monkeypatch.setitem(sys.modules, "flash_attn" if backend == "flash2" else "flash_attn_interface", module)
    plan = AttentionPlan(torch.tensor([0, *ODD_LENGTHS]).cumsum(0).int(), max(ODD_LENGTHS), sum(ODD_LENGTHS))
    queries, keys, values = detached(qkv_of(sum(ODD_LENGTHS)))
    keys, values = keys[:, :kv_heads], values[:, :kv_heads]
    ours = _KERNELS[backend](queries, keys, values, plan, window, slopes, 0.0)
    expected = attend(queries, keys, values, plan, window_size=window, alibi_slopes=slopes, backend="eager")
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)


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
        out = _KERNELS[backend](few[0], keys, values, plan, window, slopes, 0.0)
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
@pytest.mark.parametrize("window", [(-1, -1), (64, 64)], ids=str)
@pytest.mark.parametrize("backend", ["flash2", "flash3", "flex"])
def test_gpu_kernels_agree(backend: Any, window: tuple[int, int], slopes: Tensor | None) -> None:
    try:
        require_backend(backend, "cuda", torch.bfloat16, alibi=slopes is not None)
    except ConfigError as error:
        pytest.skip(str(error))
    plan = AttentionPlan(torch.tensor([0, *ODD_LENGTHS]).cumsum(0).int().cuda(), max(ODD_LENGTHS), sum(ODD_LENGTHS))
    low = detached(qkv_of(sum(ODD_LENGTHS)), torch.bfloat16, "cuda")
    slopes = None if slopes is None else slopes.cuda()
    ours = attend(*low, plan, window_size=window, alibi_slopes=slopes, backend=backend)
    exact = detached(low, device="cuda")
    expected = attend(*exact, plan, window_size=window, alibi_slopes=slopes, backend="eager")
    torch.testing.assert_close(ours.float(), expected, atol=0.03, rtol=0)
