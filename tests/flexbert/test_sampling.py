"""The sampler of masked diffusion against its exact distribution, which is enumerated from the model's own softmax."""

import itertools
from collections import Counter, defaultdict
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from flexbert import FlexBertConfig, build
from flexbert.losses import sample_tokens
from flexbert.sampling import generate
from flexbert_core.schema import RunError
from tests.helpers.models import tiny

MASK, CLS, SEP = 0, 1, 2
NEVER = [MASK, CLS, SEP]
VOCABULARY = range(3, 7)
ROW = [CLS, 4, MASK, MASK, MASK, SEP]
COUNT = 8_000


def small(**changes: Any) -> Any:
    """A model whose softmax depends much on what stands beside a token."""
    node = {
        **tiny().to_dict(),
        "vocab_size": 7,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 16,
        "init": {"name": "full_megatron", "std": 0.6},
        **changes,
    }
    return build(FlexBertConfig.from_dict(node), seed=3).eval()


def softmax(model: Any, row: tuple[int, ...]) -> Tensor:
    """(tokens, V) without what is never drawn."""
    with torch.no_grad():
        logits = model(torch.tensor(row), torch.tensor([0, len(row)], dtype=torch.int32), len(row)).logits
    logits[:, NEVER] = -torch.inf
    return logits.double().softmax(1)


def exact(model: Any, row: list[int], steps: int) -> dict[tuple[int, ...], float]:
    """Ancestral sampling as the paper writes it, over all states: from t to s a masked token is drawn with chance
    (t - s) / t, each by itself."""
    known = cache(lambda state: softmax(model, state))
    states: dict[tuple[int, ...], float] = {tuple(row): 1.0}
    for step in range(steps):
        t, s = 1 - step / steps, 1 - (step + 1) / steps
        after = defaultdict[tuple[int, ...], float](float)
        for state, chance in states.items():
            probs = known(state)
            choices = [
                [(token, 1.0)]
                if token != MASK
                else [(MASK, s / t), *((each, (t - s) / t * float(probs[place, each])) for each in VOCABULARY)]
                for place, token in enumerate(state)
            ]
            for choice in itertools.product(*choices):
                product = chance
                for _, share in choice:
                    product *= share
                if product:
                    after[tuple(token for token, _ in choice)] += product
        states = dict(after)
    return states


def draw(model: Any, rows: list[list[int]], **options: Any) -> list[list[int]]:
    return generate(model, rows, mask_token_id=MASK, never=NEVER, **{"steps": 3, "seed": 5, **options})


@pytest.mark.parametrize("steps", [1, 2, pytest.param(5, marks=pytest.mark.slow)])
def test_samples_have_the_exact_distribution(steps: int) -> None:
    """Pearson's statistic over all outcomes, within six standard deviations of what chance gives."""
    model = small()
    expected = exact(model, ROW, steps)
    assert sum(expected.values()) == pytest.approx(1)
    assert all(MASK not in state for state in expected)
    found = Counter(map(tuple, draw(model, [ROW] * COUNT, steps=steps)))
    assert set(found) <= set(expected)
    # Outcomes of few draws are taken together, so that the statistic is near its limit.
    often = {state for state, chance in expected.items() if chance * COUNT >= 10}
    pairs = [(found[state], expected[state] * COUNT) for state in often]
    rest = COUNT - sum(count for count, _ in pairs), COUNT - sum(mean for _, mean in pairs)
    statistic = sum((count - mean) ** 2 / mean for count, mean in [*pairs, rest] if mean >= 10)
    freedom = len(often)
    assert freedom > 8
    assert abs(statistic - freedom) < 6 * (2 * freedom) ** 0.5


def test_the_number_of_steps_matters_to_that() -> None:
    """So the test above would see another number."""
    model = small()
    one, two = exact(model, ROW, 1), exact(model, ROW, 2)
    assert sum(abs(one[state] - two[state]) for state in one) > 0.1


@pytest.mark.parametrize("steps", [1, 3, 1000])
def test_the_model_runs_in_so_many_steps_at_most(steps: int) -> None:
    model, calls = small(max_position_embeddings=64), list[int]()
    model.encoder.register_forward_pre_hook(lambda _, arguments: calls.append(int((arguments[0] == MASK).sum())))
    row = [CLS, *[MASK] * 40, SEP]
    (filled,) = draw(model, [row], steps=steps)
    assert MASK not in filled
    assert len(calls) <= min(steps, 40)
    assert calls[0] == 40
    assert calls == sorted(set(calls), reverse=True), "what is drawn stays"
    if steps == 1000:
        assert len(calls) > 35


def test_a_row_is_a_function_of_the_seed_and_its_number() -> None:
    model = small()
    rows = [[CLS, MASK, MASK, SEP], ROW, [CLS, 5, SEP], [CLS, *[MASK] * 9, SEP]]
    together = draw(model, rows)
    assert together == draw(model, rows)
    assert draw(model, rows[:2]) == together[:2]
    assert draw(model, rows, seed=6) != together
    for row, filled in zip(rows, together, strict=True):
        assert len(row) == len(filled)
        assert all(now == before for before, now in zip(row, filled, strict=True) if before != MASK)
        assert not set(NEVER) & {now for before, now in zip(row, filled, strict=True) if before == MASK}


def test_nothing_to_fill_in() -> None:
    model = small()
    assert draw(model, []) == []
    assert draw(model, [[CLS, SEP], [5]]) == [[CLS, SEP], [5]]


def test_temperature_and_top_p_change_the_softmax_as_they_say() -> None:
    """Of one masked token, whose distribution is then known in closed form."""
    model, row = small(), [CLS, 4, MASK, SEP]
    probs = softmax(model, tuple(row))[2]
    order = probs.argsort(descending=True)
    assert probs[order[0]] < 0.9
    for options, expected in (
        ({"temperature": 0.5}, probs**2 / (probs**2).sum()),
        ({"temperature": 3.0}, (probs ** (1 / 3)) / (probs ** (1 / 3)).sum()),
        ({"top_p": float(probs[order[0]]) + 1e-4}, None),
    ):
        if expected is None:  # the two likeliest
            expected = torch.zeros_like(probs).scatter(0, order[:2], probs[order[:2]])
            expected = expected / expected.sum()
        drawn = torch.tensor([filled[2] for filled in draw(model, [row] * COUNT, **options)]).bincount(minlength=7)
        assert (drawn / COUNT - expected).abs().max() < 6 * 0.5 / COUNT**0.5
        assert not drawn[expected == 0].any()
    best = draw(model, [row] * 50, top_p=1e-3)
    assert {filled[2] for filled in best} == {int(order[0])}


def test_at_a_high_temperature_all_that_may_be_drawn_is_alike() -> None:
    model, row = small(), [CLS, 4, MASK, SEP]
    for temperature in (torch.inf, 1e39, 1e30):
        drawn = torch.tensor([filled[2] for filled in draw(model, [row] * COUNT, temperature=temperature)])
        shares = drawn.bincount(minlength=7) / COUNT
        assert (shares[3:] - 1 / 4).abs().max() < 6 * 0.5 / COUNT**0.5
        assert not shares[:3].any()


def test_the_last_chance_gives_no_barred_token() -> None:
    """Of a vocabulary whose last ids are never drawn, and of sums beside 1."""
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(500, 8, generator=generator), torch.randn(50, 8, generator=generator)
    chance = torch.full((500,), 1 - 2**-53, dtype=torch.float64)
    drawn = sample_tokens(states, weight, None, chance, lambda logits: logits.index_fill(1, BARRED, -torch.inf))
    assert drawn.max() < BARRED[0]


BARRED = torch.arange(40, 50)


def test_what_cannot_be_drawn_from_is_refused() -> None:
    model = small()
    for options in ({"temperature": 0.0}, {"temperature": torch.nan}, {"top_p": torch.nan}, {"steps": 10**30}):
        with pytest.raises(ValueError, match=r"expected steps from 1 to 2 \*\* 53, a temperature over 0"):
            draw(model, [ROW], **options)
    torch.nn.init.constant_(model.encoder.final_norm.weight, torch.nan)
    with pytest.raises(RunError, match="the model's states are not finite"):
        draw(model, [ROW])


def test_the_model_is_left_as_it_was() -> None:
    model = small().train()
    draw(model, [ROW])
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
