"""Each schedule of the learning rate against its published formula, on the numbers of papers, or another library's."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    get_cosine_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from flexbert_core.schema import ConfigError
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from recipe.schedules import SCHEDULES
from tests.recipe.run_file import edited


def rate(plan: PhasePlan, step: int) -> float:
    return plan.at(step).lr(step)


def theirs(schedule: Any, **options: Any) -> list[float]:
    """The factors of a schedule of transformers, step by step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule(optimizer, **options)
    factors = []
    for _ in range(options["num_training_steps"]):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize(
    ("name", "decay_type", "final"),
    [("one_minus_sqrt", "1-sqrt", 0.001), ("linear", "linear", 0.02), ("cosine", "cosine", 0.1)],
)
def test_decays_equal_those_of_transformers(name: str, decay_type: str, final: float) -> None:
    """All of a phase without warmup, with ModernBERT's, MosaicBERT's and Chinchilla's lowest rate."""
    schedule, steps = SCHEDULES.build(SCHEDULES.parse({"name": name, "final": final})), 50
    reference = theirs(
        lambda optimizer, num_training_steps: get_wsd_schedule(
            optimizer, 0, steps, num_training_steps, decay_type=decay_type, min_lr_ratio=final
        ),
        num_training_steps=steps,
    )
    assert [schedule(step / steps, 0.0) for step in range(steps)] == pytest.approx(reference, rel=1e-12)


def test_warmup_stable_decay_of_modernbert(tmp_path: Path) -> None:
    """arXiv 2412.13663, sec. 2.2: 8e-4 after 3B tokens of warmup, a 1-sqrt decay over the last 50B. The
    steps' rates equal the formulas of the tokens trained: t / 3B, and 1 - sqrt((n - n0) / 50B) of arXiv 2405.18392,
    eq. 4, from 1.969T tokens on."""
    rows = {"global_batch_size": 4608, "max_seq_len": 1024}
    phases = [
        {"name": "stable", "tokens": "1.719T", **rows, "lr": 8e-4, "warmup": "3B"},
        {"name": "extension", "tokens": "250B", "max_seq_len": 8192, "global_batch_size": 576, "lr": 3e-4},
        {"name": "decay", "tokens": "50B", "schedule": {"name": "one_minus_sqrt", "final": 0.0}},
    ]
    text = edited(tmp_path, "", "").read_text()
    file = tmp_path / "paper.yaml"
    file.write_text(text.split("phases:")[0].replace("modernbert-tiny", "modernbert-base") + f"phases: {phases}\n")
    plan = PhasePlan(load_run_config(file))
    per_step = 4608 * 1024
    warmup = math.floor(3e9 / per_step)  # 635 whole steps, and a part of the next
    assert warmup == 635
    rates = [rate(plan, step) for step in (0, 317, warmup - 1, warmup, 364_000)]
    expected = [8e-4 * min(1.0, (step + 1) * per_step / 3e9) for step in (0, 317, warmup - 1, warmup, 364_000)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert rates[-2:] == [8e-4, 8e-4]
    decay = plan.phases[2]
    start, length = plan.phases[1].end_token, decay.steps * decay.max_seq_len * decay.global_batch_size
    assert start == pytest.approx(1.969e12, rel=1e-5)
    assert length == pytest.approx(50e9, rel=1e-4)
    for step in range(decay.first_step, decay.end_step, 997):
        trained = plan.tokens_before(step)
        assert rate(plan, step) == pytest.approx(3e-4 * (1 - math.sqrt((trained - start) / length)), rel=1e-9)


def one_phase(tmp_path: Path, steps: int, warmup: int, schedule: str) -> PhasePlan:
    """A phase of so many steps of 4096 tokens, with lr 1."""
    values = [f"tokens={4096 * steps}", f"warmup={4096 * warmup}", "lr=1", f"schedule={schedule}"]
    return PhasePlan(load_run_config(edited(tmp_path, "", ""), [f"phases.0.{value}" for value in values]))


@pytest.mark.parametrize("warmup", [1, 5, 25, 49])
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("linear", get_linear_schedule_with_warmup),
        ("cosine", get_cosine_schedule_with_warmup),
        ("one_minus_sqrt", None),
    ],
)
def test_a_fall_begins_where_the_warmup_ends(tmp_path: Path, name: str, reference: Any, warmup: int) -> None:
    """As those of transformers do, which reach the peak in the step after ours: theirs rise from 0 in step 0."""
    if reference is None:
        reference = lambda optimizer, num_warmup_steps, num_training_steps: get_wsd_schedule(  # noqa: E731
            optimizer,
            num_warmup_steps,
            num_training_steps - num_warmup_steps,
            num_training_steps,
            decay_type="1-sqrt",
            num_stable_steps=0,
        )
    plan = one_phase(tmp_path, 50, warmup, f"{{name: {name}, final: 0.0}}")
    ours = [rate(plan, step) for step in range(50)]
    factors = theirs(reference, num_warmup_steps=warmup, num_training_steps=50)
    assert ours[:warmup] == pytest.approx([*factors[1:warmup], 1.0], rel=1e-12)
    assert ours[warmup:] == pytest.approx(factors[warmup:], rel=1e-12, abs=1e-15)
    assert max(ours) == 1.0


def test_a_phase_that_is_all_warmup_reaches_its_peak(tmp_path: Path) -> None:
    for name in ("linear", "cosine", "one_minus_sqrt"):
        plan = one_phase(tmp_path, 10, 10, name)
        assert [rate(plan, step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])


def test_a_fall_from_the_start_is_the_line_of_bert() -> None:
    """google-research/bert, optimization.py: behind the warmup 1e-4 * (1 - step / 1,000,000). Within it there 1e-4 *
    step / 10,000, of which the recipe says that it has up to 1 % less."""
    plan = PhasePlan(load_run_config("configs/pretrain/bert-base.yaml"))
    for step in (10_000, 10_001, 450_000, 899_999):
        assert rate(plan, step) == pytest.approx(1e-4 * (1 - step / 1_000_000), rel=1e-9)
    for step in (0, 5_000, 9_999):
        assert 0.99 <= rate(plan, step) / (1e-4 * (step + 1) / 10_000) <= 1


@pytest.mark.parametrize("name", ["mosaicbert-base", "nomicbert"])
def test_recipes_of_two_phases_are_those_of_one(name: str) -> None:
    """Which is what their sources have: a linear schedule of transformers' kind."""
    two = load_run_config(f"configs/pretrain/{name}.yaml")
    rise, fall = two.phases
    whole = rise.model_copy(update={"tokens": rise.tokens + fall.tokens, "schedule": fall.schedule})
    one, two = (PhasePlan(config) for config in (two.model_copy(update={"phases": [whole]}), two))
    for step in range(0, one.total_steps, 499):
        assert rate(one, step) == pytest.approx(rate(two, step), rel=1e-9)


def inverse_sqrt(tmp_path: Path, *overrides: str) -> PhasePlan:
    """Steps of 4096 tokens; the first phase is one of 100,000 steps, 4000 of them warmup, as arXiv 1706.03762, 5.3."""
    peak = 512**-0.5 * 4000**-0.5
    values = ["tokens=409600000", "warmup=16384000", "schedule=inverse_sqrt", f"lr={peak}"]
    keys = [f"phases.0.{value}" for value in values]
    return PhasePlan(load_run_config(edited(tmp_path, "", ""), [*keys, *overrides]))


def test_inverse_sqrt_of_the_transformer(tmp_path: Path) -> None:
    """lr = d_model^-0.5 min(n^-0.5, n w^-1.5), its eq. 3; d_model 512, w 4000 steps. Ours counts the tokens trained
    before the step, so from the warmup's end on it is a step late: 1 / (2 n) more, at most 1/8000."""
    plan = inverse_sqrt(tmp_path)
    assert rate(plan, 3999) == max(rate(plan, step) for step in range(3000, 5000))
    for number in (1, 2, 1000, 3999, 4000):
        assert rate(plan, number - 1) == pytest.approx(512**-0.5 * number * 4000**-1.5, rel=1e-12)
    for number in (4001, 4002, 10_000, 99_999):
        assert rate(plan, number - 1) == pytest.approx(512**-0.5 * (number - 1) ** -0.5, rel=1e-12)
        assert rate(plan, number - 1) == pytest.approx(512**-0.5 * number**-0.5, rel=1 / 8000)


def test_inverse_sqrt_has_no_jump_and_equals_that_of_transformers(tmp_path: Path) -> None:
    plan = inverse_sqrt(tmp_path, "phases.0.tokens=4096000", "phases.0.warmup=409600", "phases.0.lr=1")
    ours = [rate(plan, step) for step in range(1000)]
    assert ours[99:101] == [1.0, 1.0]  # the step that completes the warmup, and the one after
    assert max(abs(after - before) for before, after in pairwise(ours)) < 1 / 99
    reference = theirs(
        lambda optimizer, num_training_steps: get_inverse_sqrt_schedule(optimizer, 100), num_training_steps=1000
    )
    assert ours[100:] == pytest.approx(reference[100:], rel=1e-12)
    assert ours[:100] == pytest.approx(reference[1:101], rel=1e-12)  # theirs rises from 0 in step 0


def test_inverse_sqrt_needs_a_warmup(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"phases\[0\]: schedule: inverse_sqrt falls from the end of the warmup on"):
        inverse_sqrt(tmp_path, "phases.0.warmup=0")


@pytest.mark.parametrize("name", sorted(SCHEDULES.entries))
def test_every_schedule_starts_at_the_peak_and_never_rises(name: str) -> None:
    schedule = SCHEDULES.build(SCHEDULES.parse(name))
    factors = [schedule(step / 100, 0.05) for step in range(100)]
    assert factors[0] == 1.0
    assert factors == sorted(factors, reverse=True)
    assert all(0 <= factor <= 1 for factor in factors)
