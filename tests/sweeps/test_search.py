"""`search` of a sweep file: what is proposed depends on the losses before alone; a killed search repeats nothing; the
best is judged by runs that it was not chosen by."""

import importlib.util
import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.synthetic_sweep import write_sweep
from flexbert_core.schema import ConfigError
from sweeps.arms import arm_of, difference, expand
from sweeps.file import Search, load_sweep_file
from sweeps.folder import cell_of, check_trials, read_sweep, write_cells
from sweeps.report.subject import of_sweep
from sweeps.report.tables import tables
from sweeps.results import SearchResult, Trial
from sweeps.searching import best_of, check_installed, propose, read_search, told, write_search
from tests.helpers.runs import ROOT, command, environment, run
from tests.helpers.tiny import write_config, write_data
from training.checkpoints.files import Snapshot, write_checkpoint
from training.folder import RunFolder

needs_optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="optuna is not installed: requirements-search.txt"
)
SPACE: dict[str, Any] = {
    "phases.0.lr": {"low": 1e-4, "high": 1e-1, "log": True},
    "model.num_hidden_layers": {"low": 2, "high": 4, "integer": True},
    "model.mlp": [{"name": "glu"}, {"name": "mlp"}],
}


def search(**changes: Any) -> Search:
    return Search.model_validate({"trials": 30, "values": SPACE, **changes})


def objective(trial: Trial) -> float:
    """Lowest, 0, at lr 1e-2, 3 layers and the mlp without a gate."""
    changes = trial.changes
    off = abs(np.log10(changes["phases.0.lr"]) + 2) + abs(changes["model.num_hidden_layers"] - 3)
    return float(off + (changes["model.mlp"]["name"] == "glu"))


@needs_optuna
def test_it_finds_a_planted_optimum_better_than_chance() -> None:
    """Random search of as many trials from the same space, in 20 repetitions each."""

    def best(found: list[Trial]) -> float:
        done = best_of(found)
        assert done is not None
        assert done.loss is not None
        return done.loss

    searched, random = [], []
    for seed in range(20):
        options, trials = search(seed=seed), list[Trial]()
        for _ in range(options.trials):
            trial = propose(options, trials)
            assert 1e-4 <= trial.changes["phases.0.lr"] <= 1e-1
            assert trial.changes["model.num_hidden_layers"] in (2, 3, 4)
            assert trial.changes["model.mlp"] in SPACE["model.mlp"]
            trials.append(told(trial, objective(trial)))
        searched.append(best(trials))
        draws = [propose(search(seed=1000 * seed + number), []) for number in range(options.trials)]
        random.append(best([told(replace(each, number=place), objective(each)) for place, each in enumerate(draws)]))
    assert np.mean(searched) < 0.6 * np.mean(random)


@needs_optuna
def test_a_proposal_depends_on_the_losses_before_and_on_nothing_else() -> None:
    trials = list[Trial]()
    for number in range(25):
        trials.append(propose(search(), trials))
        if number % 4 != 3:
            trials[-1] = told(trials[-1], objective(trials[-1]) if number % 5 else None)
    again = [propose(search(), trials[:number]) for number in (0, 5, 22)]
    assert [each.params for each in again] == [trials[number].params for number in (0, 5, 22)]
    assert propose(search(seed=1), []).params != trials[0].params
    others = [replace(each, loss=None if each.loss is None else -each.loss) for each in trials]
    assert propose(search(), others).params != propose(search(), trials).params


@needs_optuna
def test_it_leaves_a_region_where_runs_fail() -> None:
    """The loss falls up to where runs diverge, which is half of the space."""
    options, trials = Search.model_validate({"trials": 40, "values": {"x": {"low": 0.0, "high": 1.0}}}), list[Trial]()
    for _ in range(options.trials):
        trial = propose(options, trials)
        x = trial.changes["x"]
        trials.append(told(trial, None if x > 0.5 else 1 - x))
    assert sum(each.state == "failed" for each in trials[20:]) <= 12
    assert min(each.loss or 1.0 for each in trials) < 0.55


def test_a_trial_may_be_the_baseline(tmp_path: Path) -> None:
    file = tmp_path / "ablation.yaml"
    values = {"model.num_hidden_layers": [4, 6]}  # the demo's has 4
    node = {"base": str(ROOT / "configs/demo.yaml"), "search": {"trials": 2, "values": values}}
    file.write_text(json.dumps(node))
    design = expand(file, load_sweep_file(file))
    arm = arm_of(design, "search-0", {"model.num_hidden_layers": 4}, may_be_baseline=True)
    assert not difference(arm.config, design.baseline.config)
    with pytest.raises(ConfigError, match="trains the same as baseline"):
        arm_of(design, "search-0", {"model.num_hidden_layers": 4})


@pytest.mark.parametrize("runs", ["there", "removed"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"set": ["phases.0.tokens=300K"]}, r"phases\.0\.tokens was 900000, now 300000"),
        ({"equal": "flops"}, r"phases\.0\.tokens was 900000, now "),
        ({"branch_from": "runs/other"}, r"from\.checkpoint was 'runs/stable', now 'runs/other'"),
    ],
)
def test_a_search_goes_on_as_it_was_begun(tmp_path: Path, runs: str, changes: dict[str, Any], message: str) -> None:
    """What all trials share decides their losses: others are not mixed with these."""
    file, values = tmp_path / "ablation.yaml", {"model.num_hidden_layers": [3, 6]}
    node: dict[str, Any] = {"base": str(ROOT / "configs/demo.yaml"), "folder": str(tmp_path / "sweep"), "seeds": [0]}
    node |= {"search": {"trials": 4, "values": values}, "branch_from": "runs/stable"}
    file.write_text(json.dumps(node))
    design = expand(file, load_sweep_file(file))
    options = design.sweep.search
    assert options is not None
    made = {"model.num_hidden_layers": 6}
    write_search(design.folder, options, [Trial(0, {"model.num_hidden_layers": 1}, made, "finished", 2.0)])
    cell = cell_of(design, arm_of(design, "search-0", made), options.train_seed)
    write_cells([cell])
    if runs == "there":
        folder = RunFolder(cell.config.folder)
        folder.open(cell.config)
        folder.close()
        write_checkpoint(folder.checkpoints / "tokens-8192", Snapshot({}, {}, {}), {})
    check_trials(design, options)
    file.write_text(json.dumps({**node, **changes}))
    design = expand(file, load_sweep_file(file))
    with pytest.raises(ConfigError, match=message) as error:
        check_trials(design, options)
    assert "\n" not in str(error.value)


def test_what_is_recorded_is_read_and_another_space_is_refused(tmp_path: Path) -> None:
    trials = [told(Trial(0, {"phases.0.lr": 1e-3}, {"phases.0.lr": 1e-3}), 2.0), Trial(1, {"phases.0.lr": 2e-3}, {})]
    trials.append(told(Trial(2, {}, {}), float("nan")))
    write_search(tmp_path, search(), trials)
    assert read_search(tmp_path, search(trials=99, batch=7)) == trials
    assert [each.state for each in trials] == ["finished", "running", "failed"]
    assert best_of(trials) == trials[0]
    with pytest.raises(ConfigError, match="its trials were drawn from .* undo that"):
        read_search(tmp_path, search(seed=3))
    (tmp_path / "search.json").write_text("[]")
    with pytest.raises(ConfigError, match="damaged"):
        read_search(tmp_path)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"search": {"trials": 5, "values": {"phases.0.lrr": [1e-3, 2e-3]}}}, "search: .*a trial: .*unknown key 'lrr'"),
        ({"search": {"trials": 5, "values": {"phases.0.lr": [1e-3]}}}, r"search: values\.phases\.0\.lr: 1 to choose from"),
        ({"search": {"trials": 5, "values": SPACE, "train_seed": 1}}, r"search\.train_seed: 1 is one of seeds"),
        (
            {"search": {"trials": 5, "values": SPACE}, "list": {"search-1": {"model.num_hidden_layers": 6}}},
            "search: 'search-1' is the name of a trial",
        ),
        (
            {"search": {"trials": 5, "values": {"model.intermediate_size": [128, 512]}}, "equal": "parameters"},
            r"a trial: equal: parameters would change model\.intermediate_size, which the arm sets itself",
        ),
        (
            {"search": {"trials": 5, "values": SPACE}, "equal": "hours", "slots_per_second": {"baseline": 9.0}},
            "equal: hours: slots_per_second of a trial is not known before it is trained",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused(tmp_path: Path, node: dict[str, Any], message: str) -> None:
    file = tmp_path / "ablation.yaml"
    file.write_text(json.dumps({"base": str(ROOT / "configs/demo.yaml"), **node}))
    with pytest.raises(ConfigError, match=message) as error:
        expand(file, load_sweep_file(file))
    assert "\n" not in str(error.value)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"optuna is not installed: pip install -r requirements-search\.txt"):
        check_installed()


def test_the_report_tells_trials_from_verdicts(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": 0.0, "search-1": -0.03}, range(4), 40, 30)
    trials = [
        Trial(0, {}, {"phases.0.lr": 1e-3}, "finished", 2.2),
        Trial(1, {}, {"phases.0.lr": 2e-3}, "finished", 2.1),
    ]
    trials += [Trial(2, {}, {"phases.0.lr": 9.0}, "failed", why="exit code 1")]
    under_way = replace(sweep, search=SearchResult(4, 1000, trials))
    assert "under way: 3 of 4 trials are done" in tables(of_sweep(under_way))[0].note
    trials[1] = replace(trials[1], chosen=True)
    found = {table.key: table for table in tables(of_sweep(replace(sweep, search=SearchResult(3, 1000, trials))))}
    assert "search-1 had the lowest loss of 3 trials with seed 1000" in found["verdicts"].note
    assert "other seeds" in found["verdicts"].note
    assert [[cell.text for cell in row[:3]] for row in found["search"].rows] == [
        ["search-1", "2.1000", "chosen"],
        ["search-0", "2.2000", "finished"],
        ["search-2", "-", "failed: exit code 1"],
    ]
    assert [row[0].text for row in found["verdicts"].rows] == ["base", "search-1"]


def tiny_sweep(folder: Path, name: str) -> Path:
    if not (folder / "data").exists():
        write_data(folder / "data")
    base = write_config(folder / "base", folder / "data", 4, "full", "sparse")
    values = {"phases.0.lr": {"low": 1e-4, "high": 1e-1, "log": True}, "model.intermediate_size": [16, 32]}
    node: dict[str, Any] = {"base": str(base), "folder": str(folder / name), "seeds": [0]}
    node["search"] = {"trials": 4, "batch": 2, "values": values}
    node["executor"] = {"name": "local", "at_once": 2, "cores_per_job": 1, "gpus_per_job": 0}
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(node))
    return file


@needs_optuna
@pytest.mark.slow
@pytest.mark.long
def test_a_killed_search_goes_on_without_training_a_trial_twice(tmp_path: Path) -> None:
    """Killed while its second batch trains: the same trials, losses and choice as left alone."""
    killed, alone = tiny_sweep(tmp_path, "killed"), tiny_sweep(tmp_path, "alone")
    done = run(command("sweep", str(alone)))
    assert done.returncode == 0, done.stdout + done.stderr
    process = subprocess.Popen(command("sweep", str(killed)), cwd=ROOT, env=environment(), stdout=subprocess.PIPE)
    end = time.monotonic() + 200
    while len(found := list((tmp_path / "killed/runs").glob("search-*-s1000/summary.json"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    written = {str(file): file.stat().st_mtime_ns for file in found}
    for _ in range(5):  # a job of the start before may still be saving
        if (last := run(command("sweep", str(killed)))).returncode == 0:
            break
    assert last.returncode == 0, last.stdout + last.stderr
    assert all(Path(file).stat().st_mtime_ns == stamp for file, stamp in written.items())
    ours, theirs = (read_search(tmp_path / name) for name in ("killed", "alone"))
    assert [each for each in ours if each.chosen] == [each for each in theirs if each.chosen] != []
    assert ours == theirs
    (chosen,) = (each.number for each in ours if each.chosen)
    assert [arm.name for arm in read_sweep(tmp_path / "killed").arms] == ["baseline", f"search-{chosen}"]
    assert {each.state for each in read_sweep(tmp_path / "killed").runs.values()} == {"finished"}


DEADLY = """
import os, signal
from composer.core import Callback
from flexbert_core.schema import Component, RunError
from recipe.slots import CALLBACKS

@CALLBACKS.register("deadly")
class Deadly(Callback):
    class Config(Component):
        pass
    def __init__(self, config, **facts):
        pass
    def fit_start(self, state, logger):
        {end}
"""


@needs_optuna
@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code"), [("os.kill(os.getpid(), signal.SIGKILL)", -9), ("raise RunError('the disk is full')", 1)]
)
def test_a_trial_that_ends_three_times_has_failed(tmp_path: Path, end: str, code: int) -> None:
    """As when its values want more memory than there is. After the first two times it may have been anything."""
    (tmp_path / "deadly.py").write_text(DEADLY.replace("{end}", end))
    write_data(tmp_path / "data")
    imports, callbacks = [str(tmp_path / "deadly.py")], [{"name": "deadly"}]
    base = write_config(tmp_path / "base", tmp_path / "data", 2, "full", imports=imports, callbacks=callbacks)
    node: dict[str, Any] = {"base": str(base), "folder": str(tmp_path / "sweep"), "seeds": [0]}
    node["search"] = {"trials": 2, "batch": 1, "values": {"phases.0.lr": {"low": 1e-3, "high": 1e-2}}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(node))
    sweep = load_sweep_file(tmp_path / "sweep.yaml")
    assert sweep.search is not None
    write_search(tmp_path / "sweep", sweep.search, [replace(propose(sweep.search, []), died_at=(0, 0))])
    done = run(command("sweep", str(tmp_path / "sweep.yaml")))
    assert done.returncode == 1, done.stdout + done.stderr
    first, second = read_search(tmp_path / "sweep")
    assert (first.state, first.died_at) == ("failed", (0, 0, 0))
    assert first.why.startswith(f"it ended 3 times at 0 tokens (exit code {code}): see ")
    assert (second.state, second.died_at) == ("running", (0,))


@needs_optuna
@pytest.mark.slow
def test_a_trial_that_diverges_has_failed_at_once(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    base = write_config(
        tmp_path / "base", tmp_path / "data", 6, "full", trainer={"max_bad_steps": 2, "log_interval": 1}
    )
    node: dict[str, Any] = {"base": str(base), "folder": str(tmp_path / "sweep"), "seeds": [0]}
    node["search"] = {"trials": 2, "batch": 1, "values": {"phases.0.lr": [1e30, 2e30]}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(node))
    done = run(command("sweep", str(tmp_path / "sweep.yaml")))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "search: none of 2 trials differs from the baseline and has a loss" in done.stdout
    for trial in read_search(tmp_path / "sweep"):
        assert (trial.state, trial.died_at) == ("failed", ())
        assert trial.why.startswith("it diverged: see ")
