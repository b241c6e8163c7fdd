"""The last block at some tokens only equals the whole one at them: values, gradients, masks of dropout."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flexbert import build
from flexbert.dropout import TokenKeys, keyed_dropout
from flexbert.kernels import AttentionPlan, attend
from flexbert.model import FlexBertForMaskedLM
from flexbert.packed import round_up
from tests.flexbert.kernels.cases import LENGTHS, SLOPES, TOLERANCE, qkv_of
from tests.helpers.models import ODD_LENGTHS, batch_of, gradients, tiny

BLOCKS = ("prenorm", "postnorm", "parallel", "sandwich")


def some(total: int, share: float, seed: int = 0) -> Tensor:
    """Places of about this share of the tokens, rising."""
    return (torch.rand(total, generator=torch.Generator().manual_seed(seed)) < share).nonzero().squeeze(1)


def attended(lengths: tuple[int, ...], wanted: Tensor, backend: Any, select: bool, **options: Any) -> list[Tensor]:
    """Results at the tokens wanted, and gradients of queries, keys, values."""
    tensors = qkv_of(sum(lengths))
    plan = AttentionPlan(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths, default=0), sum(lengths))
    out = attend(*tensors, plan, backend=backend, wanted=wanted if select else None, **options)
    out = out if select else out[wanted]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    return [out, *(tensor.grad for tensor in tensors)]  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("window", [(-1, -1), (7, 7), (499, 499)], ids=str)
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_some_queries_equal_eager(
    lengths: tuple[int, ...], slopes: Tensor | None, window: tuple[int, int], share: float
) -> None:
    wanted = some(sum(lengths), share)
    options: dict[str, Any] = {"window_size": window, "alibi_slopes": slopes}
    expected = attended(lengths, wanted, "eager", select=False, **options)
    for ours, theirs in zip(attended(lengths, wanted, "sdpa", select=True, **options), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("backend", ["eager", "tiled"])
def test_other_kernels_leave_the_rest_out_afterwards(backend: Any) -> None:
    wanted = some(sum(ODD_LENGTHS), 0.3)
    pairs = [attended(ODD_LENGTHS, wanted, backend, select, window_size=(-1, -1)) for select in (True, False)]
    for ours, theirs in zip(*pairs, strict=True):
        assert torch.equal(ours, theirs)


def losses_and_gradients(model: FlexBertForMaskedLM, masked: float, keys: TokenKeys | None) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    with keyed_dropout(keys):
        loss = model(*batch_of(ODD_LENGTHS, masked=masked)).loss
    assert loss is not None
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


DROPOUTS: dict[str, Any] = {
    "attention": {"out_dropout": 0.3},
    "mlp": {"name": "glu", "inner_dropout": 0.3, "out_dropout": 0.3},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "last global": {},
    "last local": {"attention": {"global_attn_every_n_layers": 2}},
    "eager": {"attention": {"backend": "eager"}},
    "norms": {"attention": {"qk_norm": "rmsnorm", "inner_norm": "layernorm", "num_key_value_heads": 1}},
    "alibi": {"position": "alibi"},
    "dropout": DROPOUTS,
}


@pytest.mark.parametrize(
    ("masked", "recompute_every"),
    [
        (0.0, 0),
        (0.3, 0),
        (1.0, 0),
        (0.3, 1),
        *(pytest.param(masked, 1, marks=pytest.mark.slow) for masked in (0.0, 1.0)),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_the_step_is_that_of_all_tokens(block: str, variant: str, masked: float, recompute_every: int) -> None:
    model = build(tiny(**{"block": block, **VARIANTS[variant]}))
    model.encoder.recompute_every = recompute_every
    total = sum(ODD_LENGTHS)
    keys = TokenKeys(5, 2, torch.tensor([0, 200, total]).int(), total) if variant == "dropout" else None
    ours = losses_and_gradients(model, masked, keys)
    assert model.encoder.last_selects
    model.encoder.last_selects = False
    for name, expected in losses_and_gradients(model, masked, keys).items():
        torch.testing.assert_close(
            ours[name], expected, atol=2e-5, rtol=1e-4, msg=lambda text, at=name: f"{at}: {text}"
        )


def test_dropout_of_other_tokens_would_be_seen() -> None:
    """So that the case above can fail: with other keys the loss is another."""
    model, total = build(tiny(**DROPOUTS)), sum(ODD_LENGTHS)
    first, second = (TokenKeys(seed, 0, torch.tensor([0, total]).int(), total) for seed in (1, 2))
    one, other = (losses_and_gradients(model, 0.3, keys)["loss"] for keys in (first, second))
    assert abs(float(one - other)) > 1e-3


def test_states_of_the_tokens_wanted() -> None:
    ids, cu_seqlens, max_seqlen, _ = batch_of(ODD_LENGTHS)
    encoder = build(tiny(), "encoder").eval()
    wanted = some(len(ids), 0.1)
    with torch.no_grad():
        whole = encoder(ids, cu_seqlens, max_seqlen)
        torch.testing.assert_close(
            encoder(ids, cu_seqlens, max_seqlen, wanted=wanted), whole[wanted], atol=1e-5, rtol=0
        )
        assert encoder(ids, cu_seqlens, max_seqlen, wanted=wanted[:0]).shape == (0, 48)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (torch.tensor([3, 1]), "expected wanted to rise within 0 to 521"),
        (torch.tensor([1, 1]), "each token once"),
        (torch.tensor([-1, 1]), "expected wanted to rise"),
        (torch.tensor([1, 522]), "expected wanted to rise"),
        (torch.ones(522, dtype=torch.bool), r"expected wanted \(num_wanted,\) int64, got \(522,\) torch.bool"),
    ],
    ids=["falling", "twice", "negative", "beyond", "mask"],
)
def test_other_indexes_are_refused(wanted: Tensor, message: str) -> None:
    """They would give other tokens' states, silently."""
    ids, cu_seqlens, max_seqlen, _ = batch_of(ODD_LENGTHS)
    with pytest.raises(ValueError, match=message):
        build(tiny(), "encoder")(ids, cu_seqlens, max_seqlen, wanted=wanted)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("total", [1, 15, 17, 64, 523])
def test_rounding_up_adds_some_tokens_and_keeps_the_order(total: int, share: float) -> None:
    wanted = some(total, share)
    found = round_up(wanted, total)
    step = max(1, total // 16)
    assert len(found) == min(-(-len(wanted) // step) * step, total)
    assert (found.diff() > 0).all()
    assert torch.isin(wanted, found).all()
    assert torch.equal(found[torch.searchsorted(found, wanted)], wanted)


def test_what_no_masked_token_needs_is_not_computed() -> None:
    """Lines that the last layer's mlp gets, in a step and in evaluation."""
    model, batch = build(tiny()), batch_of(ODD_LENGTHS)
    seen: list[int] = []
    mlps: list[Any] = [layer.mlp for layer in model.encoder.layers]
    for mlp in mlps:
        mlp.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    masked, total = int((batch.labels != -100).sum()), len(batch.input_ids)
    model(*batch)
    model.evaluate(*batch)
    assert seen == [total, total, total, masked] * 2
    assert 0 < masked < total
