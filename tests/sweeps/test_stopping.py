"""`stop` of a sweep file: which arms go on, what is said of the others, and that runs are what they would be without."""

import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.synthetic_sweep import write_sweep
from flexbert_core.schema import ConfigError
from sweeps.arms import expand
from sweeps.budgets import at_equal, reaching
from sweeps.file import Stop, load_sweep_file
from sweeps.folder import cells_of, read_sweep
from sweeps.folder import write_sweep as record
from sweeps.report.page import page
from sweeps.report.subject import of_sweep
from sweeps.report.tables import tables
from sweeps.report.writing import markdown
from sweeps.results import Judged, Stops
from sweeps.statistics import verdicts
from sweeps.stopping import judge, read_judged, write_judged
from tests.helpers.runs import ROOT, command, environment, run, train_alone
from tests.helpers.tiny import ROW, ROWS, write_config, write_data

STEPS = 6


def losses(**arms: list[float | None]) -> dict[str, dict[int, float | None]]:
    return {arm: dict(enumerate(values)) for arm, values in arms.items()}


def kept(judged: list[Judged]) -> list[str]:
    return [each.arm for each in judged if each.kept]


def test_the_best_half_goes_on_by_the_mean_over_seeds_and_the_baseline_always() -> None:
    """Means by hand: a 2.0, b 2.1, c 2.2, d not finite."""
    found = losses(base=[9.0, 9.0], c=[1.0, 3.4], a=[2.0, 2.0], d=[1.0, None], b=[2.2, 2.0])
    assert kept(judge(Stop(), 1, found, "base", [])) == ["base", "a", "b"]
    assert kept(judge(Stop(reduction=4), 1, found, "base", [])) == ["base", "a"]
    assert kept(judge(Stop(reduction=3), 1, found, "base", [])) == ["base", "a", "b"]  # 4 / 3, rounded up
    assert kept(judge(Stop(reduction=4, survivors=3), 1, found, "base", [])) == ["base", "c", "a", "b"]


def test_an_arm_that_comes_later_is_ranked_among_all_and_decisions_stay() -> None:
    first = judge(Stop(), 1, losses(base=[2.0], a=[2.1], b=[2.2]), "base", [])
    assert kept(first) == ["base", "a"]
    late = judge(Stop(), 1, losses(base=[2.0], a=[2.1], c=[2.15], d=[2.3]), "base", first)
    assert [(each.arm, each.kept) for each in late] == [("c", True), ("d", False)]  # 2 of a, b, c, d
    assert judge(Stop(), 1, losses(base=[2.0], a=[2.1]), "base", first) == []


def test_arms_are_ranked_over_the_seeds_that_all_have() -> None:
    """Over both seeds c would be the best; the others have none but seed 0."""
    first = judge(Stop(), 1, {"base": {0: 2.0}, "a": {0: 2.1}, "b": {0: 2.2}}, "base", [])
    (late,) = judge(Stop(), 1, {"c": {0: 2.5, 1: 0.1}}, "base", first)
    assert not late.kept
    with pytest.raises(ConfigError, match="no seed in common"):
        judge(Stop(), 1, {"c": {1: 0.1}}, "base", first)


def test_decisions_are_read_as_they_were_written(tmp_path: Path) -> None:
    judged = judge(Stop(), 1, losses(base=[2.0], a=[2.1], b=[None]), "base", [])
    write_judged(tmp_path, Stop(), judged)
    assert read_judged(tmp_path, Stop()) == judged
    with pytest.raises(ConfigError, match="arms were judged by .*, which `stop` says no more"):
        read_judged(tmp_path, Stop(survivors=2))
    assert [each.kept for each in judged if each.arm == "b"] == [False]
    assert all(each.kept for each in read_judged(tmp_path, Stop(), "b") if each.arm == "b")  # the baseline now
    (tmp_path / "stops.json").write_text("{}")
    with pytest.raises(ConfigError, match="damaged: remove it"):
        read_judged(tmp_path)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"stop": {"rungs": [0.05, 0.5]}}, r"stop\.rungs: 0\.05: baseline is in the warmup of phase 'stable' then, which"),
        ({"stop": {"rungs": [0.5, 0.25]}}, r"stop: rungs: \[0\.5, 0\.25\] do not rise"),
        ({"stop": {"rungs": [0.9999999]}}, r"stop\.rungs: 0\.9999999: baseline ends there, in whole steps"),
        ({"stop": {"rungs": [1.0]}}, r"stop\.rungs\[0\]: should be less than 1"),
        ({"stop": {"reductions": 3}}, "unknown key 'reductions', did you mean 'reduction'"),
        (
            {"stop": {}, "list": {"long": {"evaluation.max_seq_len": 128}}},
            r"stop: long would be ranked by its loss on other held-out text than baseline: evaluation\.max_seq_len is 128",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_stopped_is_refused(tmp_path: Path, node: dict[str, Any], message: str) -> None:
    file = tmp_path / "ablation.yaml"
    node = {"list": {"deep": {"model.num_hidden_layers": 6}}} | node
    file.write_text(json.dumps({"base": str(ROOT / "configs/demo.yaml"), **node}))
    with pytest.raises(ConfigError, match=message) as error:
        expand(file, load_sweep_file(file))
    assert "\n" not in str(error.value)


def test_a_stopped_arm_is_told_as_stopped_and_compared_with_nothing(tmp_path: Path) -> None:
    """It still counts in Holm's family: the survivor was chosen among two."""
    gone = [("bad", seed) for seed in range(4)]
    whole = write_sweep(tmp_path, {"base": 0.0, "good": -0.03, "bad": 0.03}, range(4), 40, 30, unfinished=gone)
    runs = {cell: replace(each, state="stopped") if cell in gone else each for cell, each in whole.runs.items()}
    at = {arm: [10_000_000, 20_000_000] for arm in ("base", "good", "bad")}
    judged = [Judged(arm, 1, dict.fromkeys(range(4), 5.0), True) for arm in ("base", "good", "bad")]
    judged += [Judged(arm, 2, dict.fromkeys(range(4), 4.0), arm != "bad") for arm in ("base", "good", "bad")]
    sweep = replace(whole, runs=runs, stops=Stops([0.25, 0.5], at, judged))
    good, bad = verdicts(sweep)
    assert (good.verdict, bad.verdict) == ("better", "stopped")
    assert good.p is not None
    assert good.corrected == pytest.approx(2 * good.p)
    assert (bad.mean, bad.p, bad.differences) == (None, None, None)
    assert [one.comparisons[1].verdict for one in at_equal(sweep)] == ["stopped"] * 3
    assert {each.arm for each in reaching(sweep)} == {"good"}

    subject = of_sweep(sweep)
    assert (subject.missing, subject.whole("bad")) == ([], False)
    found = {table.key: table for table in tables(subject)}
    said = {row[0].text: row[1].text for row in found["verdicts"].rows}
    assert said == {"base": "baseline", "good": "better", "bad": "stopped at rung 2, 0.5 of its budget"}
    assert [[cell.text for cell in row] for row in found["rungs"].rows] == [
        ["base", "5.0000 goes on", "4.0000 goes on"],
        ["good", "5.0000 goes on", "4.0000 goes on"],
        ["bad", "5.0000 goes on", "4.0000 stopped"],
    ]
    assert "2 arms against base over 4 seeds: 1 better, 1 stopped." in page(subject)
    for text in (page(subject), markdown(subject)):
        assert "ncomplete" not in text.split("<body>")[-1].split("<script")[0]
        assert "stopped at rung 2, 0.5 of its budget" in text


ARMS = {
    "slow": {"phases.0.lr": 1e-5},
    "quick": {"phases.0.lr": 2e-2},
    "middle": {"phases.0.lr": 2e-3},
    "wide": {"model.intermediate_size": 32},
}


def tiny_sweep(folder: Path, name: str, **changes: Any) -> Path:
    if not (folder / "data").exists():
        write_data(folder / "data")
    base = write_config(folder / "base", folder / "data", STEPS, "full", "sparse")
    node = {"base": str(base), "folder": str(folder / name), "seeds": [3], "list": ARMS, **changes}
    node["executor"] = {"name": "local", "at_once": 2, "cores_per_job": 1, "gpus_per_job": 0}
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(node))
    return file


@pytest.mark.slow
def test_arms_beyond_a_rung_are_named_and_a_stopped_one_goes_on_as_baseline(tmp_path: Path) -> None:
    """`quick` is trained whole before there is a rung; one of the others is stopped at it, then the baseline."""
    arms = {name: ARMS[name] for name in ("slow", "quick", "middle")}
    first = tiny_sweep(tmp_path, "sweep", list={"quick": ARMS["quick"]})
    design = expand(first, load_sweep_file(first))
    record(design, cells := cells_of(design))
    train_alone(next(cell.file for cell in cells if cell.arm == "quick"))

    rule = {"rungs": [0.5], "reduction": 4}
    file = tiny_sweep(tmp_path, "sweep", list=arms, stop=rule)
    said = "quick: trained beyond it before it was asked"
    assert f"rung 1 does not rank or stop {said}" in run(command("sweep", str(file), "--dry-run")).stdout
    done = run(command("sweep", str(file)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"rung 1, 0.5 of the budget: not ranked, and not stopped there: {said}" in done.stdout
    (stopped,) = read_sweep(tmp_path / "sweep").stopped

    file = tiny_sweep(tmp_path, "sweep", list=arms, stop=rule, baseline=stopped)
    done = run(command("sweep", str(file)))
    assert done.returncode == 0, done.stdout + done.stderr
    result = read_sweep(tmp_path / "sweep")
    assert result.stopped == {}
    assert {each.state for each in result.runs.values()} == {"finished"}


def measured(folder: Path, tokens: int) -> float:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return next(line["validation"]["loss"] for line in lines if line["tokens"] == tokens and "validation" in line)


@pytest.mark.slow
def test_arms_stop_as_whole_runs_say_and_survivors_are_those_runs(tmp_path: Path) -> None:
    """Against the same arms trained whole, and ranked by hand at a third and two thirds of their steps."""
    every = [f"evaluation.interval={ROWS * ROW}"]
    whole = expand(file := tiny_sweep(tmp_path, "whole", set=every), load_sweep_file(file))
    record(whole, cells := cells_of(whole))
    for cell in cells:
        train_alone(cell.file)
    expected, going = {}, list(ARMS)
    for rung, step in enumerate((2, 4), 1):
        runs = {arm: tmp_path / f"whole/runs/{arm}-s3" for arm in going}
        ranked = sorted(going, key=lambda arm: measured(runs[arm], step * ROWS * ROW))
        places = -(-len(going) // 2)
        expected |= {arm: (rung, step) for arm in ranked[places:]}
        going = ranked[:places]
    assert len(going) == 1

    stop = tiny_sweep(tmp_path, "stop", stop={"rungs": [0.3, 0.66]}, set=every)
    kills = 0
    while True:
        process = subprocess.Popen(command("sweep", str(stop)), cwd=ROOT, env=environment(), stdout=subprocess.PIPE)
        try:
            process.communicate(timeout=25 if kills < 2 else 300)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        if process.returncode == 0:
            break
        assert process.returncode == 1  # a job of the start before was still saving
        kills += 1
        assert kills < 9
    assert kills
    result = read_sweep(tmp_path / "stop")
    assert result.stopped == {arm: rung for arm, (rung, _) in expected.items()}
    for (arm, seed), each in result.runs.items():
        other = tmp_path / f"whole/runs/{arm}-s{seed}"
        if arm in expected:
            assert (each.state, each.lines[-1]["step"]) == ("stopped", expected[arm][1])
        else:
            assert each.state == "finished"
            name = f"checkpoints/tokens-{STEPS * ROWS * ROW}/model.safetensors"
            ours, theirs = load_file(each.folder / name), load_file(other / name)
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    shown = run(command("sweep", "status", str(stop))).stdout
    assert sum(shown.count(f"stopped at rung {rung}") for rung in (1, 2)) == len(expected)
    nodes = json.loads(run(command("sweep", "status", str(stop), "--json")).stdout)["runs"]
    assert {each["arm"]: each["stopped_at_rung"] for each in nodes if each["state"] == "stopped"} == result.stopped

    # A rule that is gone stops nothing: all are trained to the end, from where they were left.
    free = tiny_sweep(tmp_path, "stop", set=every)
    assert run(command("sweep", str(free))).returncode == 0
    assert {each.state for each in read_sweep(tmp_path / "stop").runs.values()} == {"finished"}
