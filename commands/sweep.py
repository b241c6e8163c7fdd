"""`main.py sweep FILE`: an ablation on paper, trained, and how it stands."""

import json
import math
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from flexbert.accounting import count_parameters
from flexbert_core.durable import holder
from flexbert_core.schema import ConfigError
from recipe.cost import run_flops
from recipe.phases import PhasePlan
from sweeps.arms import Design, Variant, expand
from sweeps.file import Stop, load_sweep_file
from sweeps.folder import Cell, cells_of, check_trials, read_sweep, seen_otherwise
from sweeps.power import smallest_difference
from sweeps.results import RunResult, SweepResult
from sweeps.running import run_sweep
from sweeps.searching import TRIAL, best_of, name_of
from sweeps.statistics import verdicts
from sweeps.stopping import places_at, rung_tokens, unranked

_LOOK_SECONDS = 2.0


def sweep(file: Path, overrides: Sequence[str], dry_run: bool, price_per_hour: float | None, console: Console) -> bool:
    """Train what is missing, or with dry_run print what would be. Whether all runs are finished."""
    design = expand(file, load_sweep_file(file, overrides))
    if dry_run:
        _show(design, price_per_hour, console)
        return True
    # As Ctrl-C: jobs are ended, and save.
    signal.signal(signal.SIGTERM, _stop)
    return run_sweep(design, console)


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _show(design: Design, price_per_hour: float | None, console: Console) -> None:
    """Arms with what they cost, and what the design can show. Raises ConfigError as a start would."""
    cells, seeds = cells_of(design), design.sweep.seeds
    if design.sweep.search is not None:
        check_trials(design, design.sweep.search)
    rates = design.sweep.slots_per_second
    if price_per_hour is not None and len(rates) < len(design.arms):
        raise ConfigError(f"--price-per-hour: needs slots_per_second of all {len(design.arms)} arms in {design.file}")
    table = Table(
        "arm", Column("changes", overflow="fold"), "parameters", "tokens", "FLOPs", "sees the baseline's batches"
    )
    if rates:
        table.add_column("hours a run")
    hours, flops = 0.0, 0.0
    for arm in design.arms:
        plan, otherwise = PhasePlan(arm.config), seen_otherwise(arm.config, design.baseline.config)
        row = [
            Text(arm.name + (" (baseline)" if arm is design.baseline else "")),
            Text(_changes(arm)),
            f"{count_parameters(arm.config.model):,}",
            f"{plan.total_tokens:,}",
            f"{run_flops(arm.config):.3e}",
            Text(f"no: {', '.join(otherwise)}" if otherwise else "yes"),
        ]
        flops += run_flops(arm.config) * len(seeds)
        if rates:
            rate = rates.get(arm.name)
            row.append("-" if rate is None else f"{plan.total_tokens / rate / 3600:,.1f}")
            hours += math.nan if rate is None else plan.total_tokens / rate / 3600 * len(seeds)
        table.add_row(*row)
    console.print(table)
    done = sum(cell.is_finished for cell in cells)
    said = (
        f"{len(design.arms)} arms x {len(seeds)} seeds = {len(cells)} runs, {done} finished; {flops:.3e} FLOPs in all"
    )
    if rates and not math.isnan(hours):
        said += f", {hours:,.1f} hours one after the other"
        said += "" if price_per_hour is None else f", cost {hours * price_per_hour:,.2f}"
    console.print(f"{said} -> {design.folder}", soft_wrap=True)
    if (stop := design.sweep.stop) is not None:
        console.print(_rungs(stop, len(design.arms) - 1), soft_wrap=True)
        for line in _beyond(design, stop, cells):
            console.print(line, soft_wrap=True)
    if (search := design.sweep.search) is not None:
        console.print(
            f"search: {search.trials} trials before that, {run_flops(design.baseline.config) * search.trials:.3e} FLOPs"
            f" more if they are as large as the baseline; the best is an arm with {len(seeds)} seeds",
            soft_wrap=True,
        )
    console.print(_visible(design), soft_wrap=True)


def _rungs(stop: Stop, arms: int) -> str:
    """How many arms go on at each rung."""
    parts = []
    for share in stop.rungs:
        left = places_at(stop, arms)
        parts.append(f"at {share:.3g} of the budget {left} of {arms}")
        arms = left
    return f"arms that go on, beside the baseline: {', '.join(parts)}; the FLOPs and hours above are without stopping"


def _beyond(design: Design, stop: Stop, cells: Sequence[Cell]) -> list[str]:
    """Of each rung the arms that it cannot stop."""
    others = [arm for arm in design.arms if arm is not design.baseline]
    runs = {arm.name: {cell.seed: cell.config for cell in cells if cell.arm == arm.name} for arm in others}
    tokens = {arm.name: rung_tokens(stop, arm.config) for arm in others}
    found = [unranked(runs, {arm: at[place] for arm, at in tokens.items()}) for place in range(len(stop.rungs))]
    return [
        f"rung {rung} does not rank or stop {', '.join(arms)}: trained beyond it before it was asked"
        for rung, arms in enumerate(found, 1)
        if arms
    ]


def _changes(arm: Variant) -> str:
    own = [f"{path}={_plain(value)}" for path, value in arm.changes.items()]
    return "\n".join([*own, *(f"{path}={_plain(value)} (adjusted)" for path, value in arm.adjusted.items())]) or "-"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _visible(design: Design) -> str:
    """The smallest difference that is found in 80 of 100 such sweeps."""
    seeds, others = len(design.sweep.seeds), len(design.arms) - 1
    if design.sweep.search is not None and not any(arm.name.startswith(TRIAL) for arm in design.arms):
        others += 1  # the one that it will find
    noise, source = design.sweep.noise, "as the file says"
    if noise is None and (design.folder / "sweep.json").is_file():
        noise, source = _measured(read_sweep(design.folder)), "measured here"
    if seeds < 2:
        return "one seed shows no difference between arms: only how two trained models differ over documents"
    if noise is None:
        return (
            "smallest difference that it can show: not known without the noise of a paired difference over seeds: give "
            "noise=NATS, such as of a sweep that is done (`main.py sweep power`)"
        )
    smallest = smallest_difference(noise, seeds, others)
    return f"smallest difference that it can show: {smallest:.4g} nats (noise {noise:.4g}, {source}; power 80 %)"


def _measured(result: SweepResult) -> float | None:
    """The pooled deviation of paired differences, where there are some."""
    found = [each.deviation for each in verdicts(result) if each.deviation]
    return math.sqrt(statistics.fmean(value * value for value in found)) if found else None


def status(target: Path, watch: bool, as_json: bool, console: Console) -> None:
    """How a sweep stands. target: its file or its folder. watch: until nothing of it is alive."""
    if not target.exists():
        raise ConfigError(f"{target}: no such sweep file or folder")
    folder = target
    if target.is_file():
        folder = expand(target, load_sweep_file(target)).folder
    if as_json:
        console.print_json(json.dumps(_node(read_sweep(folder))))
        return
    if not watch:
        console.print(_table(read_sweep(folder)))
        return
    with Live(_table(read_sweep(folder)), console=console, auto_refresh=False) as live:
        while True:
            result = read_sweep(folder)
            live.update(_table(result), refresh=True)
            alive = holder(folder / ".lock") is not None  # between two runs, too
            if not alive and all(run.state != "running" for run in result.runs.values()):
                return
            time.sleep(_LOOK_SECONDS)


def _table(result: SweepResult) -> Table:
    search = result.search
    caption = None
    if search is not None:
        done = sum(trial.state != "running" for trial in search.trials)
        best = best_of(search.trials)
        caption = f"search: {done} of {search.wanted} trials done"
        caption += "" if best is None else f", best {name_of(best.number)} {best.loss:.4f}"
    table = Table(
        "arm",
        *(f"seed {seed}" for seed in result.seeds),
        caption=caption,
        title=Text(f"{result.name}: {result.folder}"),
    )
    for arm in result.arms:
        name = arm.name + (" (baseline)" if arm.name == result.baseline else "")
        runs = [result.runs[arm.name, seed] for seed in result.seeds]
        table.add_row(Text(name), *(Text(_shown(run, _rung(result, run))) for run in runs))
    return table


def _shown(run: RunResult, stopped_at: int | None) -> str:
    loss = _loss(run)
    at = "" if run.state in ("finished", "missing") else f" {_share(run):.0%}"
    if stopped_at is not None:
        at = f" at rung {stopped_at}{at}"
    return f"{run.state}{at}" + ("" if loss is None else f" {loss:.4f}")


def _rung(result: SweepResult, run: RunResult) -> int | None:
    """Where the sweep's rule stopped it."""
    return result.stopped.get(run.arm) if run.state == "stopped" else None


def _share(run: RunResult) -> float:
    budget = sum(int(phase["tokens"]) for phase in run.config.get("phases", ()))
    return run.lines[-1]["tokens"] / budget if run.lines and budget else 0.0


def _loss(run: RunResult) -> float | None:
    """The newest held-out one."""
    return next((line["validation"]["loss"] for line in reversed(run.lines) if "validation" in line), None)


def _node(result: SweepResult) -> dict[str, Any]:
    runs = [
        {
            "arm": arm,
            "seed": seed,
            "state": run.state,
            "stopped_at_rung": _rung(result, run),
            "share": _share(run),
            "loss": _loss(run),
            "folder": str(run.folder),
        }
        for (arm, seed), run in result.runs.items()
    ]
    node = {"name": result.name, "baseline": result.baseline, "runs": runs}
    if result.search is not None:
        node["search"] = {"wanted": result.search.wanted, "trials": [asdict(each) for each in result.search.trials]}
    return node
