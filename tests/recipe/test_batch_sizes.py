"""Batch-size warmup: the plan's closed form against a walk from step to step."""

from collections import Counter
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.feed.loader import MixtureDataset
from flexbert import FlexBertConfig
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig, load_run_config
from recipe.phases import PhasePlan
from tests.helpers.synthetic import documents, write_stream, write_tokenizer

MODEL = FlexBertConfig.from_yaml("modernbert-tiny")


def run_config(
    *phases: dict[str, Any], path: str = "nowhere", lanes: int | None = None, tokenizer: str = "nowhere"
) -> RunConfig:
    data = {"tokenizer": tokenizer, "streams": {"prose": {"path": path}}, "lanes": lanes}
    names = [{"name": f"phase-{number}", "lr": 1.0, **phase} for number, phase in enumerate(phases)]
    return RunConfig.model_validate({"name": "test", "model": MODEL, "data": data, "phases": names})


def walk(tokens: int, max_seq_len: int, target: int, start: int, warmup: int, step: int) -> list[int]:
    """Rows of every step of a phase, each decided by the slots before it: the definition, in fractions."""
    sizes = list(range(start, target, step))
    ends = [Fraction(warmup * share, sum(sizes)) for share in accumulate(sizes)]
    rows, done = [], 0
    while done < tokens:
        rows.append(next((size for size, end in zip(sizes, ends, strict=True) if done < end), target))
        done += rows[-1] * max_seq_len
    return rows


@st.composite
def phases(draw: st.DrawFn) -> dict[str, Any]:
    step = draw(st.integers(1, 6))
    start, target = sorted(draw(st.lists(st.integers(1, 12), min_size=2, max_size=2, unique=True)))
    max_seq_len, tokens = draw(st.sampled_from([8, 13, 64])), draw(st.integers(1, 20_000))
    phase: dict[str, Any] = {"tokens": tokens, "max_seq_len": max_seq_len, "global_batch_size": target * step}
    if draw(st.booleans()):
        warmup = draw(st.integers(1, tokens))
        phase["batch_size_warmup"] = {"from": start * step, "tokens": warmup, "step": step}
    return phase


@given(st.lists(phases(), min_size=1, max_size=3), st.integers(1, 3000), st.integers(0, 100))
def test_the_plan_is_the_walk(given_phases: list[dict[str, Any]], interval: int, warmup_percent: int) -> None:
    for phase in given_phases:
        phase["warmup"] = phase["tokens"] * warmup_percent // 100
    config = run_config(*given_phases)
    plan = PhasePlan(config)
    step = token = 0
    for number, phase in enumerate(given_phases):
        length, target = phase["max_seq_len"], phase["global_batch_size"]
        warmup = phase.get("batch_size_warmup", {"from": target, "tokens": 0, "step": 1})
        rows = walk(phase["tokens"], length, target, warmup["from"], warmup["tokens"], warmup["step"])
        planned = plan.phases[number]
        assert (planned.first_step, planned.steps, planned.first_token) == (step, len(rows), token)
        assert len(planned.segments) <= (target - warmup["from"]) // warmup["step"] + 1
        written = done = 0
        for size in rows:
            assert plan.at(step) is planned
            assert plan.rows_at(step) == size
            assert plan.tokens_before(step) == token
            rise = min(1.0, (done + size * length) / phase["warmup"]) if phase["warmup"] else 1.0
            assert planned.lr(step) == pytest.approx(rise)
            before, token, step, done = token, token + size * length, step + 1, done + size * length
            assert plan.crosses(step, interval) == (token // interval > before // interval)
            written += plan.crosses(step, interval) or step == planned.end_step
        assert plan.checkpoints(planned, interval) == written
        assert (planned.end_step, planned.end_token, planned.tokens) == (step, token, done)
        assert plan.is_milestone(step)
    assert (plan.total_steps, plan.total_tokens) == (step, token)
    loader = plan.loader_config(config)
    given_rows = [(part.global_batch_size, part.max_seq_len) for part in loader.phases for _ in range(part.steps)]
    assert given_rows == [(plan.rows_at(step), plan.at(step).max_seq_len) for step in range(plan.total_steps)]
    assert all(rows % loader.lanes == 0 for rows, _ in given_rows)


def test_each_size_has_as_many_steps() -> None:
    """ModernBERT-base's: 60 sizes of 768 to 4544 rows share 50B tokens; 50e9 / (1024 x their sum) = 306.4 steps each."""
    phase = {"tokens": "60B", "max_seq_len": 1024, "global_batch_size": 4608}
    plan = PhasePlan(run_config({**phase, "batch_size_warmup": {"from": 768, "tokens": "50B"}}))
    steps = Counter({segment.rows: segment.steps for segment in plan.phases[0].segments})
    assert sorted(steps) == list(range(768, 4609, 64))
    assert {steps[rows] for rows in range(768, 4608, 64)} <= {306, 307}
    assert plan.phases[0].segments[-1].first_token == pytest.approx(50e9, abs=4544 * 1024)


def test_a_run_of_trillions_is_planned_at_once() -> None:
    phase = {"tokens": "1000T", "max_seq_len": 8, "global_batch_size": 4096}
    plan = PhasePlan(run_config({**phase, "batch_size_warmup": {"from": 1, "tokens": "500T", "step": 1}}))
    assert len(plan.phases[0].segments) == 4096
    assert plan.total_steps > 10**10


@pytest.mark.parametrize(
    ("phase", "lanes", "line"),
    [
        ({"from": 8, "tokens": 100}, None, "phases[0].batch_size_warmup.from: 8 is not under 8 rows"),
        ({"from": 4, "tokens": 9000}, None, "phases[0]: batch_size_warmup of 9000 tokens is longer than the phase of 5000"),
        ({"from": 3, "tokens": 100, "step": 2}, None, "phases[0].batch_size_warmup.from: 3 is no multiple of batch_size_warmup.step 2"),
        ({"from": 3, "tokens": 100, "step": 3}, None, "phases[0].global_batch_size: 8 is no multiple of batch_size_warmup.step 3"),
        ({"from": 2, "tokens": 100, "step": 2}, 4, "phases[0].batch_size_warmup.from: 2 is no multiple of data.lanes 4"),
        ({"from": 4, "tokens": 100, "step": 2}, 4, "phases[0].batch_size_warmup.step: 2 is no multiple of data.lanes 4"),
        ({"start": 4, "tokens": 100}, None, "phases[0].batch_size_warmup: unknown key 'start'"),
    ],
)  # fmt: skip
def test_a_wrong_warmup_is_one_line(tmp_path: Path, phase: dict[str, Any], lanes: int | None, line: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "name: test\nmodel: modernbert-tiny\ndata: {tokenizer: t, streams: {prose: {path: p}}}\n"
        "phases: [{name: one, tokens: 5000, max_seq_len: 64, global_batch_size: 8, lr: 1.0}]\n"
    )
    overrides = [f"phases.0.batch_size_warmup.{key}={value}" for key, value in phase.items()]
    with pytest.raises(ConfigError) as caught:
        load_run_config(file, [*overrides, *([f"data.lanes={lanes}"] if lanes else [])])
    assert len(str(caught.value).splitlines()) == 1
    assert line in str(caught.value)


def test_a_warmup_trains_on_the_rows_that_larger_batches_would(tmp_path: Path) -> None:
    """Lanes go on where they are when the batch size changes: the rows of a warmup, laid end to end in each lane, are
    those of constant batches. And it is refused for ranks that do not divide all of its sizes."""
    write_stream(tmp_path / "prose", "train", documents(0, 200, 60))
    warmup = {
        "tokens": 4000,
        "max_seq_len": 64,
        "global_batch_size": 8,
        "batch_size_warmup": {"from": 2, "tokens": 2000},
    }
    plain = {"tokens": 6000, "max_seq_len": 64, "global_batch_size": 8}

    def lanes_of(*phase: dict[str, Any]) -> list[list[tuple[int, ...]]]:
        config = run_config(*phase, path=str(tmp_path / "prose"), lanes=2, tokenizer=write_tokenizer(tmp_path))
        dataset = MixtureDataset(PhasePlan(config).loader_config(config), 0, 1)
        rows: list[list[tuple[int, ...]]] = [[], []]
        for _, _, parts, _ in dataset.plan():
            for part in parts:
                rows[part.key.lane] += [(part.key.block, part.key.carry, part.first + n) for n in range(part.count)]
        return rows

    grown, constant = lanes_of(warmup), lanes_of(plain)
    for ours, theirs in zip(grown, constant, strict=True):
        assert len(ours) > 20
        assert ours == theirs[: len(ours)]
    config = run_config(warmup, path=str(tmp_path / "prose"), lanes=2)
    with pytest.raises(ConfigError, match=r"phases\[0\].global_batch_size: 2 is no multiple of 4 ranks: .*step"):
        MixtureDataset(PhasePlan(config).loader_config(config), 0, 4)
