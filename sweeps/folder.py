"""SWEEP/: sweep.json (what it is), stops.json (which arms a rule stopped), search.json (trials), cells/ARM-sSEED.yaml
(a run file for each run, whole, which trains alone, too), runs/ARM-sSEED (its run folder), logs/."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from callbacks.step_log import read_lines
from flexbert.accounting import count_parameters
from flexbert_core.durable import write_file
from flexbert_core.folders import what_it_is
from flexbert_core.schema import ConfigError, named
from recipe.config import RunConfig, read_recorded_config
from recipe.cost import run_flops
from recipe.objectives import own_masking
from recipe.phases import PhasePlan
from sweeps.arms import Design, Variant, arm_of, cell_name, difference
from sweeps.begun import changed_meaning, check_begun
from sweeps.file import Search
from sweeps.results import Arm, RunResult, SearchResult, Stops, SweepResult
from sweeps.run_result import read_run
from sweeps.searching import name_of, read_search
from sweeps.stopping import read_judged, rung_tokens
from training.folder import RunFolder, history

_FILE = "sweep.json"
# Where two configs may differ and yet see the same batches with the same masks.
_UNSEEN = (
    "model.",
    "optimizer.",
    "trainer.",
    "checkpoint.",
    "evaluation.",
    "evaluations",
    "ema",
    "callbacks",
    "algorithms",
    "loggers",
    "publish",
    "imports",
)
_UNSEEN_OF_PHASES = ("lr", "warmup", "schedule", "rope_theta", "name")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    arm: str
    seed: int
    config: RunConfig
    file: Path
    log: Path

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def is_finished(self) -> bool:
        return RunFolder(self.config.folder).finished() is not None


def cells_of(design: Design) -> list[Cell]:
    """A seed after the other, each with all arms. Raises ConfigError for a run that has begun otherwise."""
    found = []
    for seed in design.sweep.seeds:
        found += [cell_of(design, arm, seed) for arm in design.arms]
    return found


def cell_of(design: Design, arm: Variant, seed: int) -> Cell:
    """Raises ConfigError for a run that has begun otherwise."""
    config, name, folder = design.cell(arm, seed), cell_name(arm.name, seed), design.folder
    with named(f"{design.file}: {arm.name}, seed {seed}"):
        RunFolder(config.folder).check_config(config, phases_too=True)
        check_begun(config, [*arm.changes, *design.baseline.changes])
    return Cell(arm.name, seed, config, folder / "cells" / f"{name}.yaml", folder / "logs" / f"{name}.log")


def check_trials(design: Design, search: Search) -> None:
    """Raises ConfigError for trials of a search that were trained otherwise than the sweep file now says: by their run
    folders, or where these are gone by their run files."""
    for trial in read_search(design.folder, search):
        name = cell_name(name_of(trial.number), search.train_seed)
        file = design.folder / "cells" / f"{name}.yaml"
        if trial.state == "running" or not file.is_file():
            continue
        arm = arm_of(design, name_of(trial.number), trial.changes, may_be_baseline=True)
        cell = cell_of(design, arm, search.train_seed)
        if cell.config.folder.exists():
            continue
        recorded = read_recorded_config(file)
        before, now = history(recorded), history(cell.config)
        changed = {key: (before.get(key), now.get(key)) for key in before.keys() | now.keys()}
        changed = {key: sides for key, sides in sorted(changed.items()) if sides[0] != sides[1]}
        changed |= changed_meaning(recorded, cell.config, [*arm.changes, *design.baseline.changes])
        if changed:
            told = "; ".join(f"{key} was {was!r}, now {is_now!r}" for key, (was, is_now) in changed.items())
            raise ConfigError(
                f"{file}: this trial was trained otherwise: {told}: undo that, or give the sweep another folder"
            )


def write_cells(cells: Sequence[Cell]) -> None:
    """Their run files."""
    for cell in cells:
        cell.file.parent.mkdir(parents=True, exist_ok=True)
        write_file(cell.file, OmegaConf.to_yaml(OmegaConf.create(cell.config.model_dump(mode="json"))))


def write_sweep(design: Design, cells: Sequence[Cell]) -> None:
    """All of SWEEP but its runs, and what was decided in its course."""
    write_cells(cells)
    arms = [
        {
            "name": arm.name,
            "changes": dict(arm.changes),
            "adjusted": dict(arm.adjusted),
            "parameters": count_parameters(arm.config.model),
            "flops_per_token": run_flops(arm.config) / PhasePlan(arm.config).total_tokens,
            "notes": list(_notes(design, arm.name)),
        }
        for arm in design.arms
    ]
    node = {
        "name": design.file.stem,
        "file": str(design.file),
        "baseline": design.baseline.name,
        "seeds": design.sweep.seeds,
        "arms": arms,
    }
    if (stop := design.sweep.stop) is not None:
        tokens = {arm.name: rung_tokens(stop, arm.config) for arm in design.arms}
        node["stop"] = {"rungs": stop.rungs, "tokens": tokens}
    if (search := design.sweep.search) is not None:
        node["search"] = {"wanted": search.trials, "seed": search.train_seed}
    write_file(design.folder / _FILE, json.dumps(node, indent=1) + "\n")


def _notes(design: Design, name: str) -> list[str]:
    """What keeps an arm from the baseline's batches and masks."""
    arm = next(arm for arm in design.arms if arm.name == name)
    seen = seen_otherwise(arm.config, design.baseline.config)
    return [f"not paired with {design.baseline.name}: other batches or masks, by {', '.join(seen)}"] if seen else []


def seen_otherwise(ours: RunConfig, theirs: RunConfig) -> list[str]:
    """Config paths that give two runs of one seed other batches or masks."""
    objectives = [own_masking(run.objective) for run in (ours, theirs)]
    return [path for path in difference(ours, theirs) if _is_seen(path, objectives[0] != objectives[1])]


def _is_seen(path: str, other_targets: bool) -> bool:
    """other_targets: of the runs' objectives, one brings along what it trains on."""
    if path.startswith("objective"):
        return other_targets
    if path.startswith("phases."):
        _, _, key = path.split(".", 2)
        return not key.startswith(_UNSEEN_OF_PHASES)
    return not f"{path}.".startswith(_UNSEEN)


def read_sweep(folder: Path) -> SweepResult:
    """A sweep as it stands. Raises ConfigError for a folder that is none, or whose files are damaged."""
    node = _node(folder)
    arms = [Arm(**{**each, "notes": tuple(each["notes"])}) for each in node["arms"]]
    runs = {(arm.name, seed): _run(folder, arm.name, seed) for arm in arms for seed in node["seeds"]}
    stops = None
    if node.get("stop"):
        judged = [
            each for each in read_judged(folder, baseline=node["baseline"]) if each.arm in {arm.name for arm in arms}
        ]
        stops = Stops(**node["stop"], judged=judged)
        runs = {cell: _with_stops(run, stops) for cell, run in runs.items()}
    search = SearchResult(**node["search"], trials=read_search(folder)) if node.get("search") else None
    paired = {(arm, seed): _is_paired(run, runs[node["baseline"], seed]) for (arm, seed), run in runs.items()}
    return SweepResult(node["name"], folder, node["baseline"], arms, node["seeds"], runs, paired, stops, search)


def _with_stops(run: RunResult, stops: Stops) -> RunResult:
    """With its state as the sweep's rule has it."""
    if run.state in ("running", "finished", "failed"):
        return run
    if any(each.arm == run.arm and not each.kept for each in stops.judged):
        return replace(run, state="stopped")
    if run.state == "interrupted" and any(line["tokens"] in stops.tokens[run.arm] for line in run.lines[-1:]):
        return replace(run, state="paused")
    return run


def _node(folder: Path) -> dict[str, Any]:
    file = folder / _FILE
    if not file.is_file():
        kind = what_it_is(folder)
        fault = f"no sweep (it holds no {_FILE}) and no run" if kind is None else f"this is {kind}, no sweep and no run"
        raise ConfigError(f"{folder}: {fault}: give the folder that `sweep` has written")
    try:
        node = json.loads(file.read_text())
        if not node.keys() >= {"name", "baseline", "seeds", "arms"}:
            raise ValueError
    except (OSError, ValueError, AttributeError):
        raise ConfigError(f"{file}: damaged: the same `sweep` command writes it again") from None
    return node


def _run(folder: Path, arm: str, seed: int) -> RunResult:
    path = folder / "runs" / cell_name(arm, seed)
    if not (path / "config.yaml").is_file():
        return RunResult(path, arm, seed, "missing", {}, (), {})
    return read_run(path, arm, seed)


def _is_paired(ours: RunResult, theirs: RunResult) -> bool:
    """Whether the ledgers have the same counts, cursors and data after every step that both have, of which there must
    be one, and nothing that is not in them (maskings, row lengths) differs."""
    if ours.folder == theirs.folder:
        return True
    if not ours.config or not theirs.config:
        return False
    first, second = ({line["step"]: line for line in _ledger(run)} for run in (ours, theirs))
    common = first.keys() & second.keys()
    if not common or any(first[step] != second[step] for step in common):
        return False
    configs = [read_recorded_config(run.folder / "config.yaml") for run in (ours, theirs)]
    return not seen_otherwise(*configs)


def _ledger(run: RunResult) -> list[Mapping[str, Any]]:
    return [line for line in read_lines(run.folder / "ledger.jsonl") if line["step"]]
