"""Dropout keyed by seed, row, token and site."""

import copy
import itertools
import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from flexbert import build
from flexbert.dropout import Dropout, TokenKeys, keyed_dropout
from flexbert.model import FlexBertForMaskedLM
from tests.helpers.models import Batch, batch_of, gradients, tiny

ALL_SITES: dict[str, Any] = {
    "embedding": {"name": "tokens", "dropout": 0.2},
    "attention": {"out_dropout": 0.2},
    "mlp": {"name": "glu", "inner_dropout": 0.2, "out_dropout": 0.2},
}


def keys_of(rows: tuple[int, ...], seed: int = 3, first_row: int = 0) -> TokenKeys:
    """Of rows of so many tokens."""
    return TokenKeys(seed, first_row, torch.tensor([0, *rows]).cumsum(0).int(), sum(rows))


def deviations(kept: Tensor, probability: float) -> Tensor:
    """Each element less its mean, over its standard deviation: (T, D) float64."""
    dropped = (~kept).double()
    return (dropped - probability) / math.sqrt(probability * (1 - probability))


@pytest.mark.parametrize("probability", [1e-3, 0.1, 0.5, 0.9, 1 - 1e-9])
@pytest.mark.parametrize("channels", [1, 48, 1024])
def test_the_rate_is_the_configured_one(probability: float, channels: int) -> None:
    kept = keys_of((700, 1, 0, 1347)).kept(11, channels, probability)
    count = kept.numel()
    assert kept.shape == (2048, channels)
    bound = 5 * math.sqrt(count * probability * (1 - probability)) + 1e-3
    assert abs(int(kept.sum()) - count * (1 - probability)) < bound


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_elements_are_independent(probability: float) -> None:
    """Sums of products of pairs and triples, each of variance 1 when their elements are independent."""
    tokens, channels, site = 2048, 512, 11
    keys = keys_of((tokens,))
    drawn = deviations(keys.kept(site, channels, probability), probability)
    pairs = {
        "channels": drawn.T @ drawn / math.sqrt(tokens),
        "tokens": drawn @ drawn.T / math.sqrt(channels),
    }
    for name, sums in pairs.items():
        apart = sums[~torch.eye(len(sums), dtype=torch.bool)]
        assert apart.var() == pytest.approx(1, abs=0.05), name
        assert apart.abs().max() < 9, name  # with 0.1 tails are longer than a Gaussian's: measured 6
    for first, second in ((1, 2), (3, 100)):
        triple = drawn * drawn.roll(first, 1) * drawn.roll(second, 1)
        assert abs(float(triple.sum())) / math.sqrt(drawn.numel()) < 5
    for axis, length in ((0, tokens), (1, channels)):
        sums = drawn.sum(axis) / math.sqrt(length)
        assert sums.var() == pytest.approx(1, abs=5 * math.sqrt(2 / len(sums)))
    # Other sites, steps and rows, also those whose keys are near
    others = [
        keys.kept(site + 1, channels, probability),
        keys_of((tokens,), seed=4).kept(site, channels, probability),
        keys_of((tokens,), first_row=1).kept(site, channels, probability),
    ]
    every = [drawn, *(deviations(other, probability) for other in others)]
    for left, right in itertools.combinations(every, 2):
        assert abs(float((left * right).sum())) / math.sqrt(drawn.numel()) < 5


def test_a_row_has_its_own_mask_wherever_it_is() -> None:
    rows = (5, 0, 64, 1, 30)
    whole = keys_of(rows).kept(11, 48, 0.3).split(rows)
    assert not torch.equal(whole[2][:30], whole[4])
    for number in range(len(rows)):
        alone = keys_of(rows[number:], first_row=number).kept(11, 48, 0.3)
        assert torch.equal(alone, torch.cat(whole[number:]))
    # Nor does it depend on how long the row is, or its neighbours are
    longer = keys_of((9, 0, 70)).kept(11, 48, 0.3).split((9, 0, 70))
    assert torch.equal(longer[0][:5], whole[0])
    assert torch.equal(longer[2][:64], whole[2])


def test_every_site_has_a_number_that_follows_from_its_path() -> None:
    model = build(tiny(**ALL_SITES))
    sites = {path: module.site for path, module in model.named_modules() if isinstance(module, Dropout)}
    assert len(sites) == 1 + 3 * 4
    assert len(set(sites.values())) == len(sites)
    fewer = build(tiny(num_hidden_layers=2, **ALL_SITES), seed=9)
    assert all(sites[path] == module.site for path, module in fewer.named_modules() if isinstance(module, Dropout))
    assert model.state_dict().keys() == build(tiny()).state_dict().keys()


def losses(model: FlexBertForMaskedLM, batch: Batch, rows: tuple[int, ...], keys: TokenKeys | None = None) -> Tensor:
    """The loss, with the gradients left in the model."""
    model.zero_grad()
    with keyed_dropout(keys or keys_of(rows)):
        loss = model(*batch).loss
    loss.backward()  # outside of the context: what runs again there must remember it
    return loss.detach()


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    model, batch = build(tiny(**ALL_SITES)), batch_of((40, 24))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    loss = losses(model, batch, (40, 24))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(losses(model, batch, (40, 24)), loss)
    assert not torch.equal(losses(model, batch, (64,)), loss)
    assert not torch.equal(losses(model, batch, (40, 24), keys_of((40, 24), seed=4)), loss)
    assert not torch.equal(losses(model, batch, (40, 24), keys_of((40, 24), first_row=1)), loss)
    plain = build(tiny())
    assert torch.equal(losses(model.eval(), batch, (40, 24)), losses(plain, batch, (40, 24)))


@pytest.mark.parametrize("every", [1, 2])
def test_blocks_that_run_again_draw_the_same(every: int) -> None:
    """Also when another microbatch has run forward meanwhile, and on another thread, as autograd's of a GPU is."""
    model, batch, rows = build(tiny(**ALL_SITES)), batch_of((40, 24)), (40, 24)
    losses(model, batch, rows)
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.encoder.recompute_every = every
    losses(model, batch, rows)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())
    model.zero_grad()
    with keyed_dropout(keys_of(rows)):
        loss = model(*batch).loss
    with keyed_dropout(keys_of(rows, first_row=2)):
        model(*batch)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())


@pytest.mark.slow
def test_compiled_blocks_draw_the_same_and_are_compiled_once_for_all_layers() -> None:
    model, batch, rows = build(tiny(**ALL_SITES)), batch_of((40, 24)), (40, 24)
    compiled = copy.deepcopy(model)
    compiled.encoder.compile_blocks()
    compiled.encoder.recompute_every = 2
    expected = losses(model, batch, rows)
    counted = torch._dynamo.utils.counters["stats"]
    counted.clear()
    torch.testing.assert_close(losses(compiled, batch, rows), expected)
    graphs = counted["unique_graphs"]
    for name, gradient in gradients(compiled).items():
        other = gradients(model)[name]
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    losses(compiled, batch, rows, keys_of(rows, seed=4))
    assert counted["unique_graphs"] == graphs


def test_channels_have_no_linear_relations() -> None:
    """Four channels whose numbers fulfil i + j = k + l: where a mask were linear in them, as without the square, the
    mean of their product over tokens would be 1/3 (a square wave's Fourier series), and 0.02 is its error here."""
    tokens, channels = 2048, 1024
    keys = keys_of((tokens,))
    drawn = deviations(keys.kept(11, channels, 0.5), 0.5)
    numbers = keys.channel_numbers[channels].long()
    first, second = torch.triu_indices(channels, channels, 1)
    sums, order = ((numbers[first] + numbers[second]) & 0xFFFFFFFF).sort()
    one = (sums[1:] == sums[:-1]).nonzero().squeeze(1)
    pairs = [drawn[:, first[at]] * drawn[:, second[at]] for at in (order[one], order[one + 1])]
    assert len(one) > 10
    assert float((pairs[0] * pairs[1]).mean(0).abs().max()) < 0.12


def test_another_number_of_lines_is_refused() -> None:
    model, batch = build(tiny(**ALL_SITES)), batch_of((40, 24))
    with (
        keyed_dropout(keys_of((40, 23))),
        pytest.raises(ValueError, match="keyed dropout: expected one line for each of 63 tokens, got 64"),
    ):
        model(*batch)
