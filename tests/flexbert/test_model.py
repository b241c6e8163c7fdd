"""Loss, dropout, rotary angles, starting weights."""

import math
from typing import Any

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from flexbert import FlexBertConfig, build, losses
from flexbert.init import truncated_normal_
from flexbert.losses import TokenScores, masked_cross_entropy
from flexbert.registry import LOSSES
from flexbert.rotary import Rotation, rotate
from flexbert_core.schema import ConfigError
from tests.helpers.models import ODD_LENGTHS, batch_of, gradients, tiny


def loss_inputs(with_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """States (65, 8), decoder weight (50, 8) and bias (50,), targets (65,)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(65, 8, generator=generator).requires_grad_()
    weight = torch.randn(50, 8, generator=generator).requires_grad_()
    bias = torch.randn(50, generator=generator).requires_grad_() if with_bias else None
    targets = torch.randint(0, 50, (65,), generator=generator)
    return hidden, weight, bias, targets


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("with_bias", [True, False])
def test_chunked_loss_is_plain_cross_entropy(chunk: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS_DEFAULT", chunk * 50)
    hidden, weight, bias, targets = loss_inputs(with_bias)
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")
    loss = masked_cross_entropy(hidden, weight, bias, targets)
    assert loss.dtype == torch.float32
    # Measured: 1.2e-7 of the loss; 6.7e-6 on gradients up to 22
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)
    pairs = zip(torch.autograd.grad(loss * 3, inputs), torch.autograd.grad(expected * 3, inputs), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(masked_cross_entropy(hidden, weight, bias, targets), expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_scores_are_those_of_each_token(chunk: int, gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the loss adds to the cross entropy; a tie for the best score is a hit."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS_DEFAULT", chunk * 50)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(65, 8, generator=generator).requires_grad_(gradients)
    weight, targets = torch.randn(50, 8, generator=generator), torch.randint(0, 50, (65,), generator=generator)
    first = int(F.linear(hidden[0], weight).argmax())
    weight = torch.cat([weight, weight[first : first + 1]])
    logits = F.linear(hidden, weight).detach()
    targets[::2] = logits.argmax(1)[::2]
    targets[targets == first] = 50  # the other of two that tie
    assert targets[0] == 50
    scores = TokenScores.empty(targets)
    masked_cross_entropy(hidden, weight, None, targets, 0.1, 1e-2, scores)
    torch.testing.assert_close(scores.losses, F.cross_entropy(logits, targets, reduction="none"), atol=1e-5, rtol=1e-5)
    assert torch.equal(scores.hits, logits.gather(1, targets[:, None]).squeeze(1) == logits.max(1).values)
    assert 33 <= scores.hits.sum() < 65


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("smoothing", "z_loss", "with_bias"), [(0.0, 0.0, False), (0.1, 1e-2, True)])
def test_compiled_chunks_are_the_same_function(
    smoothing: float, z_loss: float, with_bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, of chunks of different sizes: of 6 or 7 rows, then one of all."""
    hidden, weight, bias, targets = loss_inputs(with_bias)
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    for chunk in (7, 1000):
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS_DEFAULT", chunk * 50)
        found: list[list[torch.Tensor]] = []
        for compiled in (False, True):
            scores = TokenScores.empty(targets)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = masked_cross_entropy(hidden, weight, bias, targets, smoothing, z_loss, scores, compiled)
            found.append([loss.detach(), *scores, *torch.autograd.grad(loss, inputs)])
        for plain, ours in zip(*found, strict=True):
            # Both round the same gradient to the product's dtype: here and there to neighbours
            tolerance = 2e-5 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(ours, plain, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.1, 0.0), (0.0, 1e-2), (0.3, 1e-3)])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_label_smoothing_and_z_loss_are_what_they_are_defined_as(
    chunk: int, smoothing: float, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS_DEFAULT", chunk * 50)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(65, 8, generator=generator).requires_grad_()
    weight = torch.randn(50, 8, generator=generator).requires_grad_()
    bias = torch.randn(50, generator=generator).requires_grad_()
    targets = torch.randint(0, 50, (65,), generator=generator)
    logits = F.linear(hidden, weight, bias)
    expected = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    expected = expected + z_loss * logits.logsumexp(1).square().sum()
    node = {"name": "cross_entropy", "label_smoothing": smoothing, "z_loss": z_loss}
    loss = LOSSES.build(tiny(loss=node).loss)(hidden, weight, bias, targets)
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)  # measured 1.5e-7
    inputs = [hidden, weight, bias]
    pairs = zip(torch.autograd.grad(loss * 3, inputs), torch.autograd.grad(expected * 3, inputs), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=0)
    with torch.no_grad():
        without = LOSSES.build(tiny(loss=node).loss)(hidden, weight, bias, targets)
    torch.testing.assert_close(without, expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.2, 1e-2)])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_shares_weigh_each_token(chunk: int, smoothing: float, z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the sum and its gradients, and not of the scores."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS_DEFAULT", chunk * 50)
    hidden, weight, bias, targets = loss_inputs(True)
    assert bias is not None
    shares = torch.rand(65, generator=torch.Generator().manual_seed(1)).reciprocal()
    logits = F.linear(hidden, weight, bias)
    each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    expected = ((each + z_loss * logits.logsumexp(1).square()) * shares).sum()
    scores = TokenScores.empty(targets)
    arguments = (hidden, weight, bias, targets, smoothing, z_loss, scores)
    loss = masked_cross_entropy(*arguments, shares=shares)
    torch.testing.assert_close(loss, expected, atol=0, rtol=2e-6)
    torch.testing.assert_close(scores.losses, F.cross_entropy(logits, targets, reduction="none"))
    inputs = [hidden, weight, bias]
    pairs = zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(masked_cross_entropy(*arguments, shares=shares), expected, atol=0, rtol=2e-6)


def test_training_uses_the_configured_loss_and_evaluation_the_plain_one() -> None:
    model, plain = build(tiny(loss={"name": "cross_entropy", "z_loss": 0.1})), build(tiny())
    batch = batch_of(ODD_LENGTHS)
    loss, expected = model(*batch).loss, plain(*batch).loss
    assert loss is not None
    assert expected is not None
    assert loss > expected
    assert torch.equal(model.evaluate(*batch)[0], plain.evaluate(*batch)[0])


def test_loss_logits_and_evaluation_agree() -> None:
    model = build(tiny())
    batch = batch_of(ODD_LENGTHS)
    logits = model(*batch[:3]).logits
    assert logits is not None
    assert logits.shape == (sum(ODD_LENGTHS), 97)
    output = model(*batch)
    assert output.logits is None
    assert output.loss is not None
    expected = F.cross_entropy(logits, batch.labels)
    torch.testing.assert_close(output.loss, expected)
    masked = batch.labels != -100
    loss, correct, count = model.evaluate(*batch)
    assert (loss.dtype, int(count)) == (torch.float64, int(masked.sum()))
    torch.testing.assert_close(loss.float() / count, expected)
    assert int(correct) == int((logits.argmax(1) == batch.labels)[masked].sum())
    best = torch.where(masked, logits.argmax(1), -100)
    assert int(model.evaluate(*batch[:3], best)[1]) == int(count)


@pytest.mark.parametrize("lengths", [(5, 70), (), (0, 0)], ids=str)
def test_without_masked_tokens_the_loss_and_all_gradients_are_zero(lengths: tuple[int, ...]) -> None:
    model = build(tiny())
    batch = batch_of(lengths, masked=0.0)
    output = model(*batch)
    assert output.loss is not None
    assert output.loss.item() == 0.0
    output.loss.backward()
    assert not any(gradient.any() for gradient in gradients(model).values())
    assert [float(value) for value in model.evaluate(*batch)] == [0.0, 0.0, 0.0]


def test_labels_of_another_shape_are_refused() -> None:
    batch = batch_of((5, 7))
    with pytest.raises(ValueError, match=r"expected labels \(12,\) int64, got \(5,\) torch.int64"):
        build(tiny())(*batch[:3], batch.labels[:5])


def test_bfloat16_autocast_trains_and_is_close() -> None:
    model = build(tiny(init={"name": "full_megatron"}))
    batch = batch_of(ODD_LENGTHS)
    exact = model(*batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*batch).loss
    assert loss is not None
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model).values())
    torch.testing.assert_close(loss, exact, atol=2e-3, rtol=0)  # measured 4e-5 at a loss of 4.6


DROPOUTS: list[dict[str, Any]] = [
    {"embedding": {"name": "tokens", "dropout": 0.5}},
    {"attention": {"probs_dropout": 0.5}},
    {"attention": {"out_dropout": 0.5}},
    {"mlp": {"name": "glu", "inner_dropout": 0.5}},
    {"mlp": {"name": "glu", "out_dropout": 0.5}},
]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("site", DROPOUTS, ids=str)
def test_dropout_acts_in_training_only(site: dict[str, Any], backend: Any) -> None:
    merged = {**site, "attention": {**site.get("attention", {}), "backend": backend}}
    plain, model = build(tiny(attention={"backend": backend})), build(tiny(**merged))
    batch = batch_of((5, 130))
    torch.manual_seed(0)
    assert not torch.equal(model(*batch).loss, model(*batch).loss)
    torch.manual_seed(0)
    first = model(*batch).loss
    torch.manual_seed(0)
    assert torch.equal(first, model(*batch).loss)
    assert torch.equal(model.eval()(*batch).loss, plain.eval()(*batch).loss)


def test_rope_theta_can_be_changed_and_is_carried_by_the_config() -> None:
    batch = batch_of((5, 130))
    model, other = build(tiny()), build(tiny(position={"global_theta": 1e6, "local_theta": 20.0}))
    before = model(*batch).loss
    model.set_rope_theta()
    assert torch.equal(model(*batch).loss, before)
    model.set_rope_theta(1e6)
    assert (model.config.position.global_theta, model.config.position.local_theta) == (1e6, 100.0)
    between = model(*batch).loss
    model.set_rope_theta(local_theta=20.0)
    assert torch.equal(model(*batch).loss, other(*batch).loss)
    assert len({float(loss) for loss in (before, between, other(*batch).loss)}) == 3
    assert model.config == other.config
    assert model.state_dict().keys() == build(tiny()).state_dict().keys()
    with pytest.raises(ConfigError, match=r"position\.local_theta: should be greater than or equal to 1, got -1"):
        model.set_rope_theta(local_theta=-1.0)


def test_rope_tables_grow_beyond_what_was_seen() -> None:
    model = build(tiny(num_hidden_layers=1)).eval()
    short, long = batch_of((3,)), batch_of((700,))
    fresh = build(tiny(num_hidden_layers=1)).eval()
    model(*short)
    assert torch.equal(model(*long).loss, fresh(*long).loss)


def test_scores_depend_on_distance_only() -> None:
    """The defining property of rotary positions: moving a whole document moves nothing."""
    model = build(tiny(attention={"global_attn_every_n_layers": 1}, num_hidden_layers=1)).eval()
    position = model.encoder.position
    states = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(0))
    rotations = position.for_attention(torch.arange(500), 500).global_layers
    at = [Rotation(rotations.cos[places], rotations.sin[places]) for places in ([3, 5, 9, 10], [403, 405, 409, 410])]
    products = [torch.einsum("qnh,knh->nqk", rotate(states, r), rotate(states, r)) for r in at]
    torch.testing.assert_close(products[0], products[1], atol=5e-5, rtol=0)  # measured 7e-6 of up to 25
    assert not torch.allclose(rotate(states, at[0]), rotate(states, at[1]), atol=0.1)


@pytest.mark.parametrize(("std", "cutoff_factor"), [(0.02, 2.0), (0.06, 3.0), (1 / math.sqrt(768), 0.7)])
def test_a_seed_means_the_same_weights_with_every_torch(std: float, cutoff_factor: float) -> None:
    """Truncated normals are those of torch 2.7, from the distribution that scipy has of that name."""
    values = torch.empty(301, 77)
    truncated_normal_(values, std, cutoff_factor, torch.Generator().manual_seed(3))
    reference = scipy.stats.truncnorm(-cutoff_factor, cutoff_factor, scale=std)
    assert scipy.stats.kstest(values.double().flatten().numpy(), reference.cdf).pvalue > 1e-3
    assert values.abs().max() <= cutoff_factor * std
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):  # later ones draw others
        theirs = torch.empty(301, 77)
        limit = cutoff_factor * std
        torch.nn.init.trunc_normal_(theirs, 0.0, std, -limit, limit, generator=torch.Generator().manual_seed(3))
        assert torch.equal(values, theirs)


def test_starting_weights_have_the_stated_statistics() -> None:
    # Defaults of init, at a size whose smallest matrix has 16,384 weights
    sizes = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 256}
    model = build(FlexBertConfig.from_dict({"vocab_size": 512, **sizes}))
    shrink = 0.8796  # standard deviation of a unit normal truncated at 2
    output_std = 0.02 / math.sqrt(2 * 6)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            expected = 0.0 if name == "head.decoder_bias" else 1.0
            assert (parameter == expected).all(), name
            continue
        std = output_std if name.endswith("Wo.weight") else 0.02
        assert parameter.abs().max() <= 2 * std, name
        assert parameter.abs().max() > 1.95 * std, name
        error = 4 / math.sqrt(2 * parameter.numel())
        assert abs(parameter.std().item() / (shrink * std) - 1) < error, name
        assert abs(parameter.mean().item()) < 4 * std / math.sqrt(parameter.numel()), name


def test_starting_weights_are_a_function_of_seed_and_name() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = build(tiny(), seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before), "build moved the global generator"
    torch.manual_seed(7)
    second = build(tiny(), seed=5).state_dict()
    other = build(tiny(), seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = [name for name in first if first[name].ndim > 1]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    assert not torch.equal(first["encoder.layers.0.attn.Wo.weight"], first["encoder.layers.1.attn.Wo.weight"])
    # Without the last layers, with other sizes elsewhere: what has the same name, shape and std is the same
    fewer = build(tiny(num_hidden_layers=2, intermediate_size=8), seed=5).state_dict()
    assert torch.equal(first["encoder.layers.1.attn.Wqkv.weight"], fewer["encoder.layers.1.attn.Wqkv.weight"])
    assert torch.equal(first["head.dense.weight"], fewer["head.dense.weight"])
    encoder = build(tiny(), "encoder", seed=5).state_dict()
    assert all(torch.equal(first[f"encoder.{name}"], encoder[name]) for name in encoder)


def test_unknown_tasks_are_named() -> None:
    with pytest.raises(ConfigError, match=r"task: 'classificaton' cannot be built, did you mean 'classification'\?"):
        build(tiny(), "classificaton")  # pyright: ignore[reportCallIssue, reportArgumentType]
    with pytest.raises(ConfigError, match="head: 'classification' is no masked-token head: use mlm"):
        build(tiny(head="classification"))


class _LowRank(nn.Module):
    """A linear layer and a product of two thin ones beside it (LoRA)."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    bias = None
    weight = property(lambda self: self.base.weight)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.base(rows) + self.up(self.down(rows))


def _assigns_forward(output: Any) -> None:
    output.forward = lambda rows: rows


DECODERS: dict[str, tuple[Any, str]] = {
    "low rank": (_LowRank, "_LowRank has a forward of its own"),
    "bias": (lambda output: nn.Linear(output.in_features, output.out_features), "has a bias"),
    "hook": (lambda output: output.register_forward_hook(lambda *_: None) and None, "has hooks"),
    "hook before": (lambda output: output.register_forward_pre_hook(lambda *_: None) and None, "has hooks"),
    "hook backward": (lambda output: output.register_full_backward_hook(lambda *_: None) and None, "has hooks"),
    "weight norm": (nn.utils.weight_norm, "has hooks"),
    "forward": (_assigns_forward, "Decoder has a forward of its own"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("case", DECODERS)
def test_a_decoder_that_would_never_act_is_refused(case: str) -> None:
    """The loss reads its weight, in chunks, and never calls it."""
    change, fault = DECODERS[case]
    model = build(tiny(head={"name": "mlm", "tied": False}))
    model.head.output = change(model.head.output) or model.head.output
    batch = batch_of((5, 9))
    for inputs in (batch, batch[:3]):
        with pytest.raises(ValueError, match=f"^head.output: {fault}, .*: merge it into the weight"):
            model(*inputs)


def test_a_parametrized_decoder_and_modules_in_place_of_token_types_act() -> None:
    model = build(tiny(head={"name": "mlm", "tied": False}, embedding={"name": "tokens", "token_types": 2})).eval()
    batch = batch_of((5, 9))
    plain = model(*batch[:3]).logits
    table, seen = model.encoder.embedding.types, []
    table.register_forward_hook(lambda _module, _inputs, row: seen.append(row))
    torch.testing.assert_close(model(*batch[:3]).logits, plain)
    assert torch.equal(seen[0], table.weight[:1])
    parametrize.register_parametrization(model.head.output, "weight", _Doubled())
    torch.testing.assert_close(model(*batch[:3]).logits, 2 * plain)


class _Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight
