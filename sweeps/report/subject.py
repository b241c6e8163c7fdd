"""What a report is about: a sweep, a run, or several runs that have nothing to do with one another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from callbacks.step_log import read_lines
from flexbert_core.composing import leaves
from flexbert_core.durable import holder
from flexbert_core.schema import ConfigError
from sweeps.arms import cell_name
from sweeps.results import Arm, RunResult, SweepResult
from sweeps.run_result import read_run
from sweeps.searching import name_of

_NAMES = ("name", "runs")  # of config keys that differ without saying anything


@dataclass(frozen=True)
class Subject:
    """Arms with their runs. Of runs by themselves each is an arm, and nothing is compared over seeds."""

    title: str
    arms: Sequence[Arm]
    runs: Mapping[str, Sequence[RunResult]]
    """By arm, in the order of its seeds; those that have begun."""
    sweep: SweepResult | None = None

    @property
    def alive(self) -> bool:
        """Whether something trains: of a sweep also while its command is there, which searches, waits for jobs of a
        cluster or is between two runs."""
        if self.sweep is not None and holder(self.sweep.folder / ".lock") is not None:
            return True
        runs = [run for runs in self.runs.values() for run in runs] if self.sweep is None else self.sweep.runs.values()
        return any(run.state == "running" for run in runs)

    @property
    def missing(self) -> list[tuple[str, int, str]]:
        """(arm, seed, state) of the cells of a sweep that are neither finished nor stopped by its rule."""
        cells = self.sweep.runs.items() if self.sweep else ()
        return [(arm, seed, run.state) for (arm, seed), run in cells if run.state not in ("finished", "stopped")]

    @property
    def left_over(self) -> int:
        """Finished runs of the sweep's folder that its file has no more: of an arm or seed that was taken out of it."""
        if self.sweep is None:
            return 0
        known = {run.folder.name for run in self.sweep.runs.values()}
        if (search := self.sweep.search) is not None:
            known |= {cell_name(name_of(trial.number), search.seed) for trial in search.trials}
        return sum(file.parent.name not in known for file in (self.sweep.folder / "runs").glob("*/summary.json"))

    def whole(self, arm: str) -> bool:
        """Whether all its runs are finished."""
        return arm not in {name for name, *_ in self.missing} and arm not in self.stopped

    @property
    def stopped(self) -> dict[str, str]:
        """Arms that the sweep's rule stopped, and where."""
        return {arm: self.sweep.at(arm) for arm in self.sweep.stopped} if self.sweep else {}


def read_subject(paths: Sequence[Path]) -> Subject:
    """One sweep, or runs. Raises ConfigError for what is neither, for a sweep beside others, and for no step at all."""
    runs = [path for path in paths if (path / "config.yaml").exists() or not path.is_dir()]
    if len(runs) < len(paths):
        if len(paths) > 1:
            sweep = next(path for path in paths if path not in runs)
            raise ConfigError(f"{sweep}: no run folder: give one sweep, or one or more runs")
        from sweeps.folder import read_sweep

        return of_sweep(read_sweep(paths[0]))
    return of_runs([read_run(path) for path in paths])


def of_sweep(sweep: SweepResult) -> Subject:
    """Its baseline comes first."""
    arms = sorted(sweep.arms, key=lambda arm: arm.name != sweep.baseline)
    cells = {arm.name: [sweep.runs[arm.name, seed] for seed in sweep.seeds] for arm in arms}
    begun = {name: [run for run in runs if run.lines or run.summary] for name, runs in cells.items()}
    return Subject(sweep.name, arms, begun, sweep)


def of_runs(runs: Sequence[RunResult]) -> Subject:
    """Each under its name; runs of one name under their folders."""
    if idle := [run for run in runs if not any("loss" in line for line in run.lines)]:
        raise ConfigError(f"{idle[0].folder}: nothing to draw: metrics.jsonl has no line with a loss of training yet")
    names = [run.arm for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{twice}: given twice: give each run once")
    named = [replace(run, arm=name) for name, run in zip(names, runs, strict=True)]
    changes = differences([run.config for run in named])
    arms = [Arm(run.arm, each) for run, each in zip(named, changes, strict=True)]
    return Subject(names[0] if len(runs) == 1 else f"{len(runs)} runs", arms, {run.arm: [run] for run in named})


def differences(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each config the leaves in which not all agree; of one config none."""
    flat = [leaves(_lists_as_mappings(config)) for config in configs]
    keys = sorted({key for each in flat for key in each if key not in _NAMES})
    told = [key for key in keys if any(each.get(key) != flat[0].get(key) for each in flat)]
    return [{key: each[key] for key in told if key in each} for each in flat]


def seen(run: RunResult) -> dict[str, dict[str, int]]:
    """What its ledger counted last of each stream: tokens, repeated_tokens and others; empty before the first line."""
    lines = [line for line in read_lines(run.folder / "ledger.jsonl") if "streams" in line]
    return lines[-1]["streams"] if lines else {}


def _lists_as_mappings(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {str(key): _lists_as_mappings(value) for key, value in node.items()}
    if isinstance(node, list | tuple) and node:
        return {str(place): _lists_as_mappings(value) for place, value in enumerate(node)}
    return node
