"""Attention by torch's own packed kernels, which are for CUDA: their arguments by torch's schemas, their shapes by its
own fake ones, and all around them by an equivalent of the same signature."""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flexbert import build
from flexbert.kernels import AttentionPlan, attend, choose_backend, gpu, packed_flash, set_deterministic
from flexbert_core.schema import ConfigError
from tests.flexbert.kernels.cases import LENGTHS, SLOPES, detached, qkv_of
from tests.helpers.models import batch_of, tiny

OPERATORS: Any = torch.ops
FILLING: Any = torch.utils.deterministic
CALLS: list[dict[str, Any]] = []
"""Arguments of torch's operators, by their names in its schema."""


def bound(operator: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """As torch's schema binds them; fails for what it does not take."""
    schema = operator.default._schema
    parameters = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY if each.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=each.default_value if each.has_default_value() else inspect.Parameter.empty,
        )
        for each in schema.arguments
    ]
    return dict(inspect.Signature(parameters).bind(*arguments, **named).arguments)


def scores(q: Tensor, k: Tensor, first: int, last: int, left: int, right: int) -> Tensor:
    """(N, length, length) of one document; a side of -1 has no limit."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    found = torch.einsum("qnh,knh->nqk", q[first:last].float(), k[first:last].float()) * q.shape[-1] ** -0.5
    places = torch.arange(last - first)
    offset = places[None, :] - places[:, None]
    far = (offset < -left if left >= 0 else offset > last) | (offset > right if right >= 0 else offset > last)
    return found.masked_fill(far, float("-inf"))


def forward(*arguments: Any, **named: Any) -> tuple[Any, ...]:
    call = bound(_FORWARD, arguments, named)
    CALLS.append(call)
    q, k, v, bounds = call["query"], call["key"], call["value"], call["cum_seq_q"]
    assert bounds is call["cum_seq_k"]
    assert bounds.dtype == torch.int32
    assert call["max_q"] == call["max_k"] >= max(2, int(bounds.diff().max()))
    assert (call["dropout_p"], call["is_causal"], call["return_debug_mask"]) == (0.0, False, False)
    assert call.get("scale") is None  # 1 / sqrt(H)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], 1).float()
    out, logsumexp = torch.zeros_like(q), torch.zeros(q.shape[1], len(q))
    for first, last in itertools.pairwise(bounds.tolist()):
        here = scores(q, k, first, last, call["window_size_left"], call["window_size_right"])
        out[first:last] = torch.einsum("nqk,knh->qnh", here.softmax(-1), values[first:last]).to(q.dtype)
        logsumexp[:, first:last] = here.logsumexp(-1)
    state = torch.empty(2, dtype=torch.uint64)
    return out, logsumexp, state, torch.empty((), dtype=torch.uint64), torch.empty(0, dtype=q.dtype)


def backward(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    """By the log-sum-exp and the output that forward gave, as the kernel does it (arXiv 2205.14135, algorithm 4)."""
    call = bound(_BACKWARD, arguments, named)
    CALLS.append(call | {"deterministic": torch.are_deterministic_algorithms_enabled()})
    q, k, v, bounds = call["query"], call["key"], call["value"], call["cum_seq_q"]
    assert call["rng_state"].shape == (2,)
    assert call["grad_out"].is_contiguous()
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(groups, 1).float() for x in (k, v))
    gradient, out = call["grad_out"].float(), call["out"].float()
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, keys, values))
    for first, last in itertools.pairwise(bounds.tolist()):
        part = slice(first, last)
        here = scores(q, k, first, last, call["window_size_left"], call["window_size_right"])
        weights = (here - call["logsumexp"][:, part, None]).exp()
        dv[part] = torch.einsum("nqk,qnh->knh", weights, gradient[part])
        delta = (gradient[part] * out[part]).sum(-1).T[:, :, None]
        ds = weights * (torch.einsum("qnh,knh->nqk", gradient[part], values[part]) - delta) * q.shape[-1] ** -0.5
        dq[part] = torch.einsum("nqk,knh->qnh", ds, keys[part])
        dk[part] = torch.einsum("nqk,qnh->knh", ds, q[part].float())
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


_FORWARD, _BACKWARD = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In place of torch's kernels the equivalents, on a CPU that passes for an H100 without flash-attn."""
    for operator in (packed_flash.packed_flash, packed_flash.packed_flash_backward):
        operator.register_kernel("cpu")(operator._init_fn)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    real = gpu.why_not
    monkeypatch.setattr(gpu, "why_not", lambda backend, _, *rest: real(backend, "cuda", *rest))
    monkeypatch.setattr(gpu, "installed", lambda package: not package.startswith("flash"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(packed_flash, "why_not", lambda: "")
    CALLS.clear()
    yield
    set_deterministic(True)


def test_the_installed_torch_has_the_kernels_as_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert packed_flash.why_not() == ""


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("window", [(-1, -1), (0, 0), (7, 7), (64, 64)], ids=str)
@pytest.mark.parametrize("lengths", [*LENGTHS, (1,) * 5], ids=str)
def test_outputs_and_gradients_are_those_of_eager(
    lengths: tuple[int, ...], window: tuple[int, int], kv_heads: int
) -> None:
    found = []
    for name, dtype in (("torch_flash", torch.bfloat16), ("eager", torch.float32)):
        queries, keys, values = (t.detach().bfloat16().to(dtype) for t in qkv_of(sum(lengths)))
        tensors = [t.requires_grad_() for t in (queries, keys[:, :kv_heads], values[:, :kv_heads])]
        plan = AttentionPlan(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths, default=0), sum(lengths))
        out = attend(*tensors, plan, window_size=window, backend=name)  # pyright: ignore
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
        found.append([out, *torch.autograd.grad((out * weights).sum(), tensors)])
    assert len(CALLS) == (2 if sum(lengths) else 0)
    for ours, expected in zip(*found, strict=True):
        assert ours.dtype == torch.bfloat16
        # Each is rounded once, the output that the gradient is computed from besides. Measured: 0.006
        assert (ours.float() - expected).norm() <= 0.015 * expected.norm() + 1e-3 * max(sum(lengths), 1) ** 0.5


@pytest.mark.parametrize("deterministic", [True, False])
def test_backward_is_called_as_the_run_wants_it(deterministic: bool) -> None:
    """In the process's deterministic mode, which is as it was behind the call."""
    set_deterministic(deterministic)
    tensors = [x.bfloat16().requires_grad_() for x in detached(qkv_of(9))]
    plan = AttentionPlan(torch.tensor([0, 3, 9], dtype=torch.int32), 6, 9)
    attend(*tensors, plan, window_size=(2, 2), backend="torch_flash").sum().backward()  # pyright: ignore
    assert CALLS[1]["deterministic"] is deterministic
    assert not torch.are_deterministic_algorithms_enabled()
    assert FILLING.fill_uninitialized_memory


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_fakes_have_the_shapes_of_torchs_own(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with FakeTensorMode():
        q = torch.empty(96, 4, 16, dtype=torch.bfloat16, device="cuda")
        k, v = (torch.empty(96, kv_heads, 16, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        bounds = torch.empty(6, dtype=torch.int32, device="cuda")
        longest = torch.empty((), dtype=torch.int64)
        ours = OPERATORS.flexbert.packed_flash(q, k, v, bounds, longest, 64, 64, True)
        window = {"window_size_left": 64, "window_size_right": 64}
        theirs = OPERATORS.aten._flash_attention_forward(q, k, v, bounds, bounds, 40, 40, 0.0, False, False, **window)
        for mine, real in zip(ours, theirs[:2], strict=True):
            assert (mine.shape, mine.dtype, mine.stride()) == (real.shape, real.dtype, real.stride())
            assert mine.device.type == "cuda"
        grads = OPERATORS.flexbert.packed_flash_backward(ours[0], q, k, v, *ours, bounds, longest, 64, 64, True)
        for mine, real in zip(grads, (q, k, v), strict=True):
            assert (mine.shape, mine.dtype) == (real.shape, real.dtype)


@pytest.mark.usefixtures("kernels")
def test_operators_keep_torchs_rules() -> None:
    q, k, v = (x.bfloat16().requires_grad_() for x in detached(qkv_of(9)))
    bounds = torch.tensor([0, 3, 9], dtype=torch.int32)
    arguments = (q, k, v, bounds, torch.tensor(6), 2, 2, True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(packed_flash.packed_flash, arguments, test_utils=tests)


def test_a_compiled_block_is_one_graph_for_all_batches() -> None:
    """Whatever its documents: their number and the longest of them are no constants of the code."""
    graphs: list[Any] = []

    def count(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    attention = {"name": "multihead", "backend": "torch_flash", "global_attn_every_n_layers": 3, "window_per_side": 4}
    model, plain = (build(tiny(num_hidden_layers=4, attention=attention)) for _ in range(2))
    model.encoder.compile_blocks(backend=count, fullgraph=True)
    numbers = []
    for lengths in ((20, 1, 11), (5, 27), (4, 4, 4, 4, 16), (32,)):
        batch = batch_of(lengths)[:3]
        labels = torch.where(torch.arange(32) % 3 == 0, torch.arange(32), -100)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = (each(*batch, labels=labels).loss for each in (model, plain))
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
        ours.backward()
        numbers.append(len(graphs))
    # first, local and last block, and the global one between
    assert numbers[0] <= 4
    assert numbers == [numbers[0]] * 4
    torch._dynamo.reset()


def test_auto_takes_them_where_flash_attn_is_absent() -> None:
    assert choose_backend("cuda", torch.bfloat16) == "torch_flash"
    assert choose_backend("cuda", torch.bfloat16, alibi=True) == "sdpa"
    assert choose_backend("cuda", torch.bfloat16, drops=True) == "sdpa"
    assert choose_backend("cuda", torch.float32) == "sdpa"


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({"alibi_slopes": SLOPES}, torch.bfloat16, "torch's packed flash attention has no ALiBi: use auto, or sdpa"),
        ({"dropout_p": 0.1}, torch.bfloat16, "torch's packed flash attention has no dropout of attention weights"),
        ({}, torch.float32, "torch's packed flash attention computes in bfloat16 or float16, not torch.float32"),
    ],
    ids=str,
)
def test_what_they_cannot_do_is_refused(options: dict[str, Any], dtype: torch.dtype, message: str) -> None:
    plan = AttentionPlan(torch.tensor([0, 3, 9], dtype=torch.int32), 6, 9)
    with pytest.raises(ConfigError, match=message):
        attend(*detached(qkv_of(9), dtype), plan, window_size=(-1, -1), backend="torch_flash", **options)
