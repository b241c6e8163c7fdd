"""Every kernel equals the eager reference, and the reference equals a loop."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from flexbert import build
from flexbert.kernels import AttentionPlan, attend, choose_backend, gpu, require_backend
from flexbert.kernels.cpu import tiles
from flexbert_core.schema import ConfigError
from tests.flexbert.kernels.cases import LENGTHS, SLOPES, TOLERANCE, detached, qkv_of
from tests.helpers.models import ODD_LENGTHS, batch_of, gradients, tiny


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
@pytest.mark.parametrize("tile", [2**22, 2**13], ids=["whole", "cut"])
def test_tiled_equals_eager(
    lengths: tuple[int, ...], window: tuple[int, int], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The smaller tile cuts heads, queries and blocks apart, as the larger does in batches of thousands of tokens.
    monkeypatch.setattr(tiles, "TILE_BYTES", tile)
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
        [((found.double() - right).norm() / right.norm()).item() for found, right in zip(found, exact, strict=True)]
        for found in (outputs("tiled", torch.bfloat16), outputs("eager", torch.bfloat16))
    ]
    for ours, plain in zip(*errors, strict=True):
        assert ours < 1.25 * plain  # measured: 0.9 to 1.1 of it, 0.003 to 0.005


@pytest.mark.parametrize("backend", ["sdpa", "tiled"])
@pytest.mark.parametrize("window", [(-1, -1), (7, 7)], ids=str)
def test_under_autocast_it_is_the_same_wherever_backward_runs(backend: Any, window: tuple[int, int]) -> None:
    plan = AttentionPlan(torch.tensor([0, 70, 200], dtype=torch.int32), 130, 200)
    found = []
    for inside in (False, True):
        tensors = qkv_of(200)
        with torch.autocast("cpu", torch.bfloat16):
            out = attend(*tensors, plan, window_size=window, backend=backend)
            if inside:
                gradients = torch.autograd.grad(out.float().square().sum(), tensors)
        if not inside:
            gradients = torch.autograd.grad(out.float().square().sum(), tensors)
        found.append([out, *gradients])
    for outside, inside in zip(*found, strict=True):
        assert torch.equal(outside, inside)


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


@pytest.mark.slow
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [(-1, -1), (7, 7), (64, 64)], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "tiled"])
def test_the_layout_of_a_result_does_not_depend_on_the_number_of_sequences(
    backend: Any, window: tuple[int, int], dtype: torch.dtype
) -> None:
    """Code that is compiled behind it is made for one layout."""
    strides = set()
    for lengths in ((40, 24), (64,)):
        plan = AttentionPlan(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths), 64)
        q, k, v = (each.to(dtype) for each in detached(qkv_of(64)))
        out = attend(q, k, v, plan, window_size=window, backend=backend)
        strides.add(out.stride())
    assert len(strides) == 1


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


@pytest.mark.parametrize("window", [(-1, -1), (1, 1), (7, 7), (64, 64)], ids=str)
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
@pytest.mark.parametrize("lengths", [ODD_LENGTHS, (3,) * 20, (500, 20, 31), (0, 5, 0, 1)], ids=str)
@pytest.mark.parametrize("backend", ["eager", "sdpa", "tiled"])
def test_bfloat16_errs_by_its_own_rounding(
    backend: Any, lengths: tuple[int, ...], slopes: Tensor | None, window: tuple[int, int]
) -> None:
    """Output and all gradients against float64 of the same inputs."""
    if backend == "tiled" and slopes is not None:
        pytest.skip("the tiled kernel has no ALiBi: refused, see below")
    found = []
    for name, dtype in ((backend, torch.bfloat16), ("eager", torch.float64)):
        tensors = [t.detach().bfloat16().to(dtype).requires_grad_() for t in qkv_of(sum(lengths))]
        plan = AttentionPlan(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths), sum(lengths))
        out = attend(*tensors, plan, window_size=window, alibi_slopes=slopes, backend=name)  # pyright: ignore
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
        found.append([out, *torch.autograd.grad((out * weights).sum(), tensors)])
    for ours, exact in zip(*found, strict=True):
        assert ours.dtype == torch.bfloat16
        # bfloat16 rounds by at most 0.4 %, here inputs of products, the output and, in eager, scores
        assert (ours.double() - exact).norm() < 0.015 * exact.norm()


def test_auto_is_the_fastest_on_cpu_and_a_named_kernel_is_never_swapped() -> None:
    assert choose_backend("cpu", torch.float32) == "sdpa"
    low = "tiled" if tiles.tiles_are_fastest(torch.bfloat16) else "sdpa"
    assert choose_backend("cpu", torch.bfloat16) == low
    assert choose_backend("cpu", torch.bfloat16, alibi=True) == "sdpa"
    assert choose_backend("cpu", torch.bfloat16, drops=True) == "sdpa"
    with pytest.raises(ConfigError, match=r"attention\.backend: flash2 cannot run: .* needs a CUDA device, not cpu"):
        run("flash2", (4,), (-1, -1))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"attention\.backend: flash2 cannot run"):
            build(tiny(attention={"backend": "flash2"}))
    if not gpu.installed("flash_attn"):
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


def test_the_kernel_of_initial_layers_is_checked_when_the_model_is_built() -> None:
    initial = {"attention": {"name": "multihead", "backend": "tiled"}}
    with pytest.raises(
        ConfigError, match=r"^initial_layers\.attention\.backend: tiled cannot run: .* no ALiBi: use auto"
    ):
        build(tiny(position="alibi", initial_layers=initial))
    with pytest.raises(ConfigError, match=r"^attention\.backend: tiled cannot run: the tiled kernel has no ALiBi"):
        build(tiny(position="alibi", attention={"backend": "tiled"}, initial_layers={"mlp": "mlp"}))
    # Every layer is an initial one: the model's own attention is in none of them
    build(tiny(position="alibi", attention={"backend": "tiled"}, initial_layers={"count": 4, "attention": "multihead"}))


@pytest.mark.parametrize(
    ("capability", "head_dim", "chosen"),
    [
        ((9, 0), 56, "flash3"),
        ((9, 0), 256, "flash2"),
        ((9, 0), 257, "sdpa"),
        ((9, 0), 100, "flash2"),
        ((8, 0), 72, "flash2"),
        ((8, 6), 248, "flash2"),
        ((8, 0), 264, "sdpa"),
        ((7, 5), 80, "sdpa"),
    ],
)
def test_auto_takes_no_flash_attn_that_the_device_or_the_head_size_rules_out(
    capability: tuple[int, int], head_dim: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head sizes that no other test asks about: answers are kept."""
    monkeypatch.setattr(gpu, "installed", lambda package: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(gpu, "is_deterministic", lambda: False)
    assert choose_backend("cuda", torch.bfloat16, head_dim=head_dim) == chosen
    require_backend("flex", "cuda", torch.bfloat16, head_dim=head_dim)
    if chosen == "sdpa":
        found = (
            r"compute capability 8\.0 \(A100\), not 7\.5" if head_dim == 80 else f"heads of at most 256, not {head_dim}"
        )
        with pytest.raises(
            ConfigError, match=rf"attention\.backend: flash2 cannot run: flash-attn (has|needs) {found}"
        ):
            require_backend("flash2", "cuda", torch.bfloat16, head_dim=head_dim)


def test_a_named_kernel_is_asked_about_the_models_head_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits are of CUDA kernels: what the model asks is checked in place of what the device answers."""
    asked = []
    monkeypatch.setattr(gpu, "why_not", lambda *given: asked.append(given) or "")
    build(tiny(attention={"backend": "flash2"}))
    assert {given[3] for given in asked} == {16}
    asked.clear()
    model = build(tiny(attention={"backend": "flex"}, num_hidden_layers=1))
    model(*batch_of((3,))[:3])
    assert [given[3] for given in asked] == [16, 16, 16]  # twice when built, once in the forward
