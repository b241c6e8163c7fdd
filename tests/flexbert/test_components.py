"""Components that no preset uses, against formulas written here; statistics of starting weights."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flexbert import build
from flexbert.registry import POSITIONS
from flexbert_core.schema import ConfigError
from tests.flexbert.formulas import Weights, gelu, layer_norm, linear, rms_norm, silu
from tests.helpers.models import ODD_LENGTHS, batch_of, gradients, tiny

TOLERANCE = 1e-4  # measured 2.5e-5 on logits up to 8

NORM = {"name": "layernorm", "bias": True, "eps": 1e-12}


def grouped_attention(w: Weights, layer: str, x: Tensor, *, fused: bool, turn: Any, bias: Any, normed: bool) -> Tensor:
    """3 query heads of 16, one key-value head; with `normed`, norms of queries and keys and sub-LN."""
    if fused:
        queries, keys, values = linear(w, f"{layer}.attn.Wqkv", x).split([48, 16, 16], 1)
    else:
        queries, keys, values = (linear(w, f"{layer}.attn.{name}", x) for name in ("Wq", "Wk", "Wv"))
    keys = turn(rms_norm(w, f"{layer}.attn.k_norm", keys) if normed else keys)
    heads = []
    for head in range(3):
        query = queries[:, 16 * head : 16 * head + 16]
        query = turn(rms_norm(w, f"{layer}.attn.q_norm", query) if normed else query)
        heads.append((query @ keys.T / 4 + bias(head, len(x))).softmax(1) @ values)
    joined = torch.cat(heads, 1)
    if normed:
        joined = layer_norm(w, f"{layer}.attn.inner_norm", joined)
    return linear(w, f"{layer}.attn.Wo", joined)


def ntk_turned_pairs(x: Tensor) -> Tensor:
    """The first 8 of 16 components, pairs side by side, theta 5000 at twice the context."""
    columns = list(x.unbind(1))
    for i in range(4):
        angle = torch.arange(len(x)) * ((2 * 5000) ** (-2 * i / 8) / 2 ** (2 / 8))
        first, second = x[:, 2 * i], x[:, 2 * i + 1]
        columns[2 * i] = first * angle.cos() - second * angle.sin()
        columns[2 * i + 1] = second * angle.cos() + first * angle.sin()
    return torch.stack(columns, 1)


SANDWICH: dict[str, Any] = {
    "embedding": {"name": "tokens", "scaled": True, "norm": False},
    "position": {
        "name": "rope",
        "global_theta": 5000.0,
        "layout": "interleaved",
        "rotary_fraction": 0.5,
        "scaling": "ntk",
        "scaling_factor": 2.0,
    },
    "attention": {
        "name": "multihead",
        "num_key_value_heads": 1,
        "qk_norm": "rmsnorm",
        "fused": False,
        "inner_norm": NORM,
    },
    "norm": "rmsnorm",
    "mlp": {"name": "mlp", "activation": "relu_squared", "inner_norm": "rmsnorm"},
    "block": "sandwich",
    "initial_layers": {"count": 2, "mlp": {"name": "glu", "activated_half": "second", "activation": "sigmoid"}},
    "head": {"name": "mlm", "transform": False, "tied": False},
}


def sandwich(w: Weights, ids: Tensor) -> Tensor:
    x = w["encoder.embedding.tokens.weight"][ids] * math.sqrt(48)
    for index in range(4):
        layer = f"encoder.layers.{index}"
        y = rms_norm(w, f"{layer}.attn_norm", x)
        y = grouped_attention(
            w, layer, y, fused=False, turn=ntk_turned_pairs, bias=lambda head, length: 0.0, normed=True
        )
        x = x + rms_norm(w, f"{layer}.attn_out_norm", y)
        y = linear(w, f"{layer}.mlp.Wi", rms_norm(w, f"{layer}.mlp_norm", x))
        if index < 2:
            y = y[:, :40] / (1 + torch.exp(-y[:, 40:]))
        else:
            y = rms_norm(w, f"{layer}.mlp.inner_norm", y.clamp_min(0) ** 2)
        x = x + rms_norm(w, f"{layer}.mlp_out_norm", linear(w, f"{layer}.mlp.Wo", y))
    return rms_norm(w, "encoder.final_norm", x) @ w["head.output.weight"].T + w["head.decoder_bias"]


PARALLEL: dict[str, Any] = {
    "position": "alibi",
    "norm": NORM,
    "attention": {
        "name": "multihead",
        "num_key_value_heads": 1,
        "qkv_bias": True,
        "global_attn_every_n_layers": 2,
        "window_per_side": 9,
    },
    "mlp": {"name": "glu", "activation": "silu"},
    "block": "parallel",
    "head": {"name": "mlm", "decoder_bias": False, "activation": "silu"},
}


def parallel(w: Weights, ids: Tensor) -> Tensor:
    slopes = [2**-4, 2**-8, 2**-2]
    x = layer_norm(w, "encoder.embedding.norm", w["encoder.embedding.tokens.weight"][ids])
    for index in range(4):
        layer = f"encoder.layers.{index}"

        def bias(head: int, length: int, local: bool = index % 2 == 1) -> Tensor:
            distance = (torch.arange(length)[:, None] - torch.arange(length)).abs()
            scores = -slopes[head] * distance
            return scores.masked_fill(distance > 9, float("-inf")) if local else scores

        y = x if index == 0 else layer_norm(w, f"{layer}.norm", x)
        activated, factor = linear(w, f"{layer}.mlp.Wi", y).chunk(2, 1)
        attended = grouped_attention(w, layer, y, fused=True, turn=lambda x: x, bias=bias, normed=False)
        x = x + attended + linear(w, f"{layer}.mlp.Wo", silu(activated) * factor)
    x = layer_norm(w, "encoder.final_norm", x)
    x = layer_norm(w, "head.norm", silu(linear(w, "head.dense", x)))
    return x @ w["encoder.embedding.tokens.weight"].T


MIXED: dict[str, Any] = {
    "position": "none",
    "norm": NORM,
    "mlp": {"name": "mlp", "out_bias": True},
    "block": {"name": "prenorm", "skip_first_attention_norm": False},
    "initial_layers": {"block": "postnorm", "attention": {"name": "multihead", "out_bias": True}},
    "attention": {"name": "multihead", "num_key_value_heads": 1},
}


def mixed(w: Weights, ids: Tensor) -> Tensor:
    """No positions, and a first layer in post-norm with another attention."""
    x = layer_norm(w, "encoder.embedding.norm", w["encoder.embedding.tokens.weight"][ids])
    for index in range(4):
        layer = f"encoder.layers.{index}"
        if index == 0:
            qkv = linear(w, f"{layer}.attn.Wqkv", x).split(16, 1)
            heads = [(qkv[head] @ qkv[3 + head].T / 4).softmax(1) @ qkv[6 + head] for head in range(3)]
            x = layer_norm(w, f"{layer}.attn_norm", x + linear(w, f"{layer}.attn.Wo", torch.cat(heads, 1)))
            y = linear(w, f"{layer}.mlp.Wo", gelu(linear(w, f"{layer}.mlp.Wi", x)))
            x = layer_norm(w, f"{layer}.mlp_norm", x + y)
            continue
        y = layer_norm(w, f"{layer}.attn_norm", x)
        x = x + grouped_attention(w, layer, y, fused=True, turn=lambda x: x, bias=lambda head, length: 0, normed=False)
        y = gelu(linear(w, f"{layer}.mlp.Wi", layer_norm(w, f"{layer}.mlp_norm", x)))
        x = x + linear(w, f"{layer}.mlp.Wo", y)
    x = layer_norm(w, "encoder.final_norm", x)
    x = layer_norm(w, "head.norm", gelu(linear(w, "head.dense", x)))
    return x @ w["encoder.embedding.tokens.weight"].T + w["head.decoder_bias"]


@pytest.mark.parametrize(("changes", "reference"), [(SANDWICH, sandwich), (PARALLEL, parallel), (MIXED, mixed)])
def test_logits_and_gradients_equal_the_formulas(changes: dict[str, Any], reference: Any) -> None:
    model = build(tiny(**changes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    batch = batch_of(ODD_LENGTHS)
    logits = torch.cat([reference(weights, ids) for ids in batch.split()])
    assert logits.abs().max() > 1
    torch.testing.assert_close(model(*batch[:3]).logits, logits, atol=TOLERANCE, rtol=0)
    F.cross_entropy(logits, batch.labels).backward()
    loss = model(*batch).loss
    assert loss is not None
    loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(
            gradient, weights[name].grad, atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )  # measured 2e-6 of up to 1.3


def test_linear_scaling_moves_places_closer_together() -> None:
    plain, scaled = tiny(), tiny(position={"scaling": "linear", "scaling_factor": 4.0})
    places = torch.arange(0, 400, 4)
    theirs = POSITIONS.build(plain.position, model=plain).for_attention(places // 4, 100).global_layers
    ours = POSITIONS.build(scaled.position, model=scaled).for_attention(places, 400).global_layers
    torch.testing.assert_close(ours.cos, theirs.cos, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.sin, theirs.sin, atol=1e-6, rtol=0)


@pytest.mark.parametrize("changes", [SANDWICH, PARALLEL, MIXED, {"position": "learned"}], ids=["s", "p", "m", "l"])
@pytest.mark.parametrize("lengths", [(1,), (), (0, 0), (0, 3, 0)], ids=str)
def test_smallest_batches_train(changes: dict[str, Any], lengths: tuple[int, ...]) -> None:
    model = build(tiny(**changes))
    batch = batch_of(lengths, masked=1.0)
    loss = model(*batch).loss
    assert loss is not None
    loss.backward()
    found = gradients(model)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert bool(found["encoder.embedding.tokens.weight"].any()) == (sum(lengths) > 0)


def test_learned_positions_restart_in_each_document_and_end_with_an_error() -> None:
    model = build(tiny(position={"name": "learned", "offset": 2})).eval()
    batch = batch_of((5, 256))
    model(*batch)
    states = model.encoder(*batch[:3])
    alone = model.encoder(batch.input_ids[5:], torch.tensor([0, 256], dtype=torch.int32), 256)
    torch.testing.assert_close(states[5:], alone, atol=1e-5, rtol=0)
    states.square().sum().backward()
    table = gradients(model.encoder.position)["table.weight"]
    assert table.shape == (258, 48)
    assert not table[:2].any(), "RoBERTa's two rows before position 0 are unused"
    assert table[2:].abs().sum(1).all()
    with pytest.raises(ValueError, match="a sequence of 257 tokens is longer than the 256 learned positions: cut it"):
        model(*batch_of((5, 257)))
    with pytest.raises(ValueError, match="the model has no token types"):
        model(*batch[:3], token_type_ids=torch.zeros_like(batch.input_ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": {"num_key_value_heads": 2}}, "num_key_value_heads: 2 does not divide num_attention_heads 3: try 1, 3"),
        ({"position": {"rotary_fraction": 0.2}}, "rotary_fraction: 0.2 of heads of 16 is 3.2, no even number: try 0.25"),
        ({"position": {"scaling_factor": 2.0}}, "scaling_factor: 2.0 without scaling: set scaling to linear or ntk"),
        ({"initial_layers": {"mlp": "glou"}}, "initial_layers.mlp: unknown mlp 'glou', did you mean 'glu'?"),
        ({"initial_layers": {"attention": {"name": "multihead", "num_key_value_heads": 2}}}, "initial_layers: attention.num_key"),
        ({"attention": {"qk_norm": "rmsnrm"}}, "attention.qk_norm: unknown norm 'rmsnrm', did you mean 'rmsnorm'?"),
        ({"loss": {"name": "cross_entropy", "z_los": 1.0}}, "loss: unknown key 'z_los', did you mean 'z_loss'?"),
    ],
    ids=str,
)  # fmt: skip
def test_errors_name_the_field_and_the_fix(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("init", "std", "limit"),
    [
        ({"name": "default", "std": 0.05}, 0.05, None),
        ({"name": "normal", "std": 0.05}, 0.05 * 0.8796, 0.1),  # a normal cut at two deviations is narrower
        ({"name": "uniform", "limit": 0.06}, 0.06 / math.sqrt(3), 0.06),
    ],
)
@pytest.mark.parametrize("small", [False, True])
def test_starting_weights_of_one_distribution(
    init: dict[str, Any], std: float, limit: float | None, small: bool
) -> None:
    model = build(tiny(hidden_size=192, num_attention_heads=3, init={**init, "small_embedding": small}))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            continue
        expected = 1e-4 / math.sqrt(3) if small and name == "encoder.embedding.tokens.weight" else std
        assert abs(parameter.std().item() / expected - 1) < 5 / math.sqrt(2 * parameter.numel()), name
        if limit is not None and expected == std:
            assert 0.97 * limit < parameter.abs().max() <= limit, name


def test_depth_scaled_weights_shrink_with_width_and_depth() -> None:
    model = build(tiny(hidden_size=192, num_attention_heads=3, init="depth_scaled"))
    cut = 0.9866  # a normal cut at three deviations
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            continue
        expected = cut / math.sqrt(parameter.shape[1])
        if name.endswith("Wo.weight"):
            expected /= math.sqrt(2 * (int(name.split(".")[2]) + 1))
        assert abs(parameter.std().item() / expected - 1) < 5 / math.sqrt(2 * parameter.numel()), name


def test_megatrons_decoder_of_its_own_starts_with_the_width() -> None:
    """architectures.md, sec. 3: untied decoder H^-0.5; everything else has the plain std, outputs less."""
    init = {"name": "full_megatron", "std": 0.02}
    model = build(tiny(hidden_size=192, num_attention_heads=3, init=init, head={"name": "mlm", "tied": False}))
    cut = 0.8796  # a normal cut at two deviations
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            continue
        expected = 0.02 / math.sqrt(8) if name.endswith("Wo.weight") else 0.02
        expected = cut * (192**-0.5 if name == "head.output.weight" else expected)
        assert abs(parameter.std().item() / expected - 1) < 5 / math.sqrt(2 * parameter.numel()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {"position": {"name": "sinusoidal", "learned_scale": True}, "head": {"name": "mlm", "transform": False}},
        {"position": "sinusoidal", "norm": {"name": "layernorm", "eps": 1e-6, "bias": True}},
        {"position": "sinusoidal", "embedding": {"name": "tokens", "norm": False, "scaled": True}, "block": "postnorm"},
        {"position": "learned", "embedding": {"name": "tokens", "token_types": 2}},
        {"position": "alibi"},
    ],
    ids=["cramming", "sinusoidal", "scaled", "learned", "alibi"],
)  # fmt: skip
def test_models_of_other_dtypes_train(changes: dict[str, Any], dtype: torch.dtype) -> None:
    """Whole models in one dtype, without autocast: the residual stream has it from the embedding on."""
    reference = build(tiny(**changes, init={"name": "default", "std": 0.05}))
    model = build(tiny(**changes, init={"name": "default", "std": 0.05})).to(dtype)
    batch = batch_of((5, 70))
    output, expected = model(*batch), reference(*batch)
    assert model.encoder(*batch[:3]).dtype == dtype
    assert output.loss is not None
    torch.testing.assert_close(output.loss.float(), expected.loss.float(), atol=0.02, rtol=0)  # measured 0.004
    output.loss.backward()
    for name, gradient in gradients(model).items():
        assert gradient.dtype == dtype, name
        assert gradient.isfinite().all(), name


def test_token_types_of_another_shape_are_refused() -> None:
    model = build(tiny(embedding={"name": "tokens", "token_types": 2}))
    batch = batch_of((5, 1))
    for shape in ((1,), (7,), (6, 1), ()):
        with pytest.raises(ValueError, match=r"expected token_type_ids \(6,\), got"):
            model(*batch[:3], token_type_ids=torch.zeros(shape, dtype=torch.int64))
    ids = torch.zeros(2, 10, dtype=torch.int64)
    for shape in ((4, 10), (2, 11), (10,), (20,)):
        with pytest.raises(ValueError, match=r"expected token_type_ids \(2, 10\), got"):
            model.encode(ids, torch.ones_like(ids), torch.zeros(shape, dtype=torch.int64))
