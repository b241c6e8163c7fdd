"""From a sweep file to arms: what they are called, that they say all in which they differ, what makes them equal."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from flexbert import build
from flexbert.accounting import count_parameters
from flexbert_core.schema import ConfigError
from recipe.config import load_run_config
from recipe.cost import run_flops
from recipe.phases import PhasePlan
from sweeps.arms import Design, drawn, expand
from sweeps.file import SweepFile, load_sweep_file
from sweeps.folder import seen_otherwise

ROOT = Path(__file__).parent.parent.parent
FILES = sorted((ROOT / "configs" / "sweep").glob("*.yaml"))
DEEP = {"deep": {"model.num_hidden_layers": 6}}


def design(folder: Path, /, **node: Any) -> Design:
    file = folder / "ablation.yaml"
    file.write_text(json.dumps({"base": str(ROOT / "configs/demo.yaml"), **node}, ensure_ascii=False))
    return expand(file, load_sweep_file(file))


def test_a_grid_is_crossed_and_stands_beside_a_list(tmp_path: Path) -> None:
    grid = {"model.attention.window_per_side": [8, 16], "phases.0.lr": [1e-3, 2e-3]}
    found = design(tmp_path, grid=grid, list=DEEP, baseline="window_per_side=8,lr=0.001")
    names = ["window_per_side=8,lr=0.001", "window_per_side=8,lr=0.002", "window_per_side=16,lr=0.001"]
    assert [arm.name for arm in found.arms] == [*names, "window_per_side=16,lr=0.002", "deep"]
    config = found.arms[3].config
    assert (config.model.attention.window_per_side, config.phases[0].lr) == (16, 2e-3)
    assert found.folder == Path("runs/sweep-ablation")
    cell = found.cell(found.arms[4], 3)
    assert (cell.seed, cell.model.num_hidden_layers, cell.name) == (3, 6, "deep-s3")
    assert cell.folder == Path("runs/sweep-ablation/runs/deep-s3")


def test_without_a_baseline_there_is_one_that_changes_nothing(tmp_path: Path) -> None:
    found = design(tmp_path, list=DEEP)
    assert [(arm.name, arm.changes) for arm in found.arms] == [("baseline", {}), ("deep", DEEP["deep"])]


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    found = design(tmp_path, list=DEEP, folder=f"{tmp_path}/Läufe 😀")
    assert found.cell(found.baseline, 0).runs == f"{tmp_path}/Läufe 😀/runs"


def test_two_sweeps_keep_their_copies_apart(tmp_path: Path) -> None:
    found = design(tmp_path, list=DEEP, set=["checkpoint.remote=s3://bucket/runs"])
    assert found.cell(found.baseline, 0).checkpoint.remote == "s3://bucket/runs/sweep-ablation"


def test_more_random_arms_leave_the_first_ones_as_they_are(tmp_path: Path) -> None:
    values = {"phases.0.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "model.attention.window_per_side": [4, 8, 32]}
    values["model.num_hidden_layers"] = {"low": 2, "high": 9, "integer": True}
    few, many = (design(tmp_path, random={"arms": arms, "values": values}).arms for arms in (3, 40))
    assert [arm.changes for arm in few] == [arm.changes for arm in many[:4]]
    rates = sorted(arm.config.phases[0].lr or 0 for arm in many[1:])
    assert 1e-4 <= rates[0] < 3e-4
    assert 3e-3 < rates[-1] <= 1e-2
    assert len({arm.config.model.num_hidden_layers for arm in many[1:]}) > 4


def test_whole_numbers_are_drawn_evenly_and_nothing_leaves_its_range(tmp_path: Path) -> None:
    near = {"low": 0.99990, "high": 0.99999}  # of four digits either is 1
    values = {"model.num_hidden_layers": {"low": 1, "high": 3, "integer": True}, "optimizer.beta2": near}
    values["model.attention.window_per_side"] = {"low": 1, "high": 8, "integer": True, "log": True}
    sweep = SweepFile.model_validate({"base": "base.yaml", "random": {"arms": 1000, "values": values}})
    assert sweep.random is not None
    points = drawn(sweep.random)
    layers = Counter(point["model.num_hidden_layers"] for point in points)
    assert layers.keys() == {1, 2, 3}
    assert all(250 < count < 420 for count in layers.values())  # 1000 / 3, give or take five deviations
    assert all(near["low"] <= point["optimizer.beta2"] <= near["high"] for point in points)
    windows = Counter(point["model.attention.window_per_side"] for point in points)
    assert windows.keys() == set(range(1, 9))
    assert windows[1] > windows[2] > windows[4]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({}, "no arms: give grid, list, random or search"),
        ({"list": {"a": {"model.num_hiden_layers": 2}}}, "a: .*unknown key 'num_hiden_layers', did you mean"),
        (
            {"list": {"a": {"optimizer.name": "adamw"}}},
            r"a: differs from baseline in more than it says: optimizer\.\w+ is",
        ),
        (
            {"random": {"arms": 2, "values": {"model.num_hidden_layers": {"low": 1.4, "high": 3, "integer": True}}}},
            r"integer: low 1\.4 is not whole: give a whole number",
        ),
        (
            {
                "search": {
                    "trials": 2,
                    "values": {"model.num_hidden_layers": {"low": 0.4, "high": 8, "log": True, "integer": True}},
                }
            },
            r"integer: low 0\.4 is not whole",
        ),
        ({"list": {"a": {"seed": 3}}}, "a: seed: a sweep sets this itself: use seeds"),
        ({"list": DEEP, "set": ["seed=7"]}, "set: seed: a sweep sets this itself: use seeds"),
        ({"list": DEEP, "set": ["name=mine"]}, "set: name: a sweep sets this itself: leave it out"),
        (
            {"list": DEEP, "set": ["from=runs/other"], "branch_from": "runs/stable-s{seed}"},
            "set: from: branch_from says where every arm starts",
        ),
        ({"list": {"a": {"model.num_hidden_layers": 4}}}, "a: trains the same as baseline: leave it out"),
        ({"list": {"a": {"ema": {"decay": 0.999}}}}, "a: differs from baseline in `ema` alone, which moves no weight"),
        (
            {"list": {"b": {"ema.decay": 0.9}, "a": {"ema.decay": 0.99}}, "set": ["ema.decay=0.9"], "baseline": "b"},
            "a: differs from b in `ema` alone",
        ),
        ({"list": DEEP, "baseline": "dep"}, "baseline: 'dep' is no arm, did you mean 'deep'"),
        ({"list": DEEP, "seeds": [1, 1]}, "seeds: a value stands there twice"),
        (
            {"list": {"a=1": DEEP["deep"], "a_1": {"model.num_hidden_layers": 7}}},
            "arms a=1, a_1 have one name as folders",
        ),
        ({"grid": {"phases.0.lr": []}}, r"grid\.phases\.0\.lr: no values"),
        ({"list": DEEP, "equal": "hours"}, "equal: hours: needs slots_per_second"),
        (
            {"list": {"a": {**DEEP["deep"], "model.intermediate_size": 64}}, "equal": "parameters"},
            r"a: equal: parameters would change model\.intermediate_size, which the arm sets itself",
        ),
        ({"list": {"a": {"model.hidden_size": 512}}, "equal": "parameters"}, "a: equal: parameters: .* by hand"),
        ({"list": DEEP, "branch_from": "runs/stable"}, r"branch_from: one checkpoint goes on with its own seed only"),
        (
            {"list": {"a": {"from.data": "restart"}}, "branch_from": "runs/stable-s{seed}"},
            r"a: from\.data: branch_from says where every arm starts",
        ),
        ({"list": DEEP, "set": ["publish={folder: out}"]}, "baseline: publish: its runs would overwrite one another"),
        ({"list": DEEP, "lists": {}}, "unknown key 'lists', did you mean 'list'"),
        (
            {"list": DEEP, "equal": "hours", "tokens_per_second": {"baseline": 1.0, "deep": 1.0}},
            "unknown key 'tokens_per_second', did you mean 'slots_per_second'",
        ),
        ({"list": DEEP, "slots_per_second": {"dep": 1.0}}, "slots_per_second: 'dep' is no arm, did you mean 'deep'"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, node: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        design(tmp_path, **node)
    assert "\n" not in str(error.value)


def test_a_component_of_another_name_may_bring_keys_of_its_own(tmp_path: Path) -> None:
    optimizer = {"name": "adamw", "weight_decay": 1e-5, "beta2": 0.98, "eps": 1e-6}
    assert len(design(tmp_path, list={"adamw": {"optimizer": optimizer}}).arms) == 2


def test_every_seed_branches_from_its_own_checkpoint(tmp_path: Path) -> None:
    made = design(tmp_path, list={"low": {"phases.0.lr": 1e-4}}, branch_from="runs/stable-s{seed}")
    for arm in made.arms:
        for seed in (0, 2):
            origin = made.cell(arm, seed).origin
            assert origin is not None
            assert origin.checkpoint == f"runs/stable-s{seed}"
    restarted = {"checkpoint": "runs/stable", "data": "restart"}
    made = design(tmp_path, list={"low": {"phases.0.lr": 1e-4}}, branch_from=restarted)
    origin = made.cell(made.arms[1], 2).origin
    assert origin is not None
    assert origin.model_dump(exclude_defaults=True) == restarted


def test_equal_parameters(tmp_path: Path) -> None:
    found = design(tmp_path, list={**DEEP, "plain": {"model.mlp": {"name": "mlp"}}}, equal="parameters")
    wanted = count_parameters(found.baseline.config.model)
    for arm in found.arms[1:]:
        assert arm.adjusted.keys() == {"model.intermediate_size"}
        assert abs(count_parameters(arm.config.model) - wanted) <= 0.01 * wanted


def test_equal_budgets(tmp_path: Path) -> None:
    arms = {**DEEP, "short": {"phases.0.tokens": 450_000}}
    by_flops = design(tmp_path, list=DEEP, equal="flops")
    deep = by_flops.arms[1]
    assert run_flops(deep.config) == pytest.approx(run_flops(by_flops.baseline.config), rel=0.01)
    assert deep.config.phases[0].warmup / deep.config.phases[0].tokens == pytest.approx(1 / 9, rel=1e-4)
    with pytest.raises(ConfigError, match=r"would change phases\.0\.tokens, which the arm sets itself"):
        design(tmp_path, list=arms, equal="tokens")
    rates = {"baseline": 2000.0, "deep": 1000.0}
    by_hours = design(tmp_path, list=DEEP, equal="hours", slots_per_second=rates)
    tokens = [PhasePlan(arm.config).total_tokens for arm in by_hours.arms]
    assert tokens[1] / tokens[0] == pytest.approx(0.5, rel=0.01)


def test_an_objective_with_targets_of_its_own_is_no_pair(tmp_path: Path) -> None:
    """Next tokens are other targets than masked ones; detection of replaced tokens has the same masks."""
    found = design(tmp_path, list={"clm": {"objective": "clm"}, "rtd": {"objective": "rtd"}})
    baseline, clm, rtd = (arm.config for arm in found.arms)
    assert "objective.name" in seen_otherwise(clm, baseline)
    assert seen_otherwise(rtd, baseline) == []


@pytest.mark.parametrize("file", [file for file in FILES if file.stem.endswith("-paper")], ids=lambda file: file.stem)
def test_runs_of_the_papers_budget_end_within_their_slurm_limit(file: Path) -> None:
    """At 100 TFLOP/s, a third of an A100's peak."""
    sweep = load_sweep_file(file)
    seconds = [run_flops(arm.config) / 1e14 for arm in expand(file, sweep).arms]
    assert max(seconds) < 60 * sweep.executor.minutes < 1.5 * max(seconds)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_worked_ablations_are_what_they_say(file: Path) -> None:
    """At both budgets, each arm built on the meta device."""
    for base in ("base/cpu.yaml", "base/paper.yaml"):
        sweep = load_sweep_file(file, [f"base={base}"])
        found = expand(file, sweep)
        assert len(found.arms) >= 2
        assert all(count_parameters(arm.config.model) > 0 for arm in found.arms)
        paired = all(not seen_otherwise(arm.config, found.baseline.config) for arm in found.arms)
        assert paired == (file.stem not in ("masking-rate", "packing", "recipes"))


@pytest.mark.parametrize(("name", "base"), [("tiling", "cpu"), ("tiling-paper", "paper")])
def test_tiling_grows_from_what_the_base_file_trains(name: str, base: str) -> None:
    small = load_run_config(ROOT / f"configs/sweep/base/{base}.yaml")
    file = ROOT / "configs" / "sweep" / f"{name}.yaml"
    fresh, *tiled = expand(file, load_sweep_file(file)).arms
    assert len(tiled) == 2
    assert count_parameters(fresh.config.model) > 1.5 * count_parameters(small.model)
    for arm in tiled:
        export = Path(small.runs) / small.name / "exports" / f"tokens-{PhasePlan(small).total_tokens}"
        assert arm.config.model.init.source == str(export)


@pytest.mark.parametrize("name", ["window", "norm", "activation", "rope-share", "biases", "block"])
def test_arms_of_a_seed_share_the_weights_that_they_share(name: str) -> None:
    """Tensors of one name and shape begin alike, to the bit."""
    file = ROOT / "configs" / "sweep" / f"{name}.yaml"
    found = expand(file, load_sweep_file(file))
    baseline, *others = (build(arm.config.model, seed=5).state_dict() for arm in found.arms)
    for other in others:
        shared = [key for key in baseline.keys() & other.keys() if baseline[key].shape == other[key].shape]
        assert len(shared) > len(baseline) / 2
        for key in shared:
            assert torch.equal(baseline[key], other[key]), key
