"""What the page draws: curves of every run, thinned, and what each picture takes of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sweeps.curves import AXES, Costs
from sweeps.report.scores import score_lines
from sweeps.report.subject import Subject, seen
from sweeps.results import RunResult
from sweeps.statistics import DOCUMENTS, final_losses, other_text

_MOST = 1000  # points of a curve
_ALL = 18_000  # points of all runs together: 50 arms x 3 seeds fit into 6 MB, and a browser draws them in 2 s
_FEWEST = 60
_GIB = 2**30


def pictures(subject: Subject) -> dict[str, Any]:
    """JSON values: charts, arms, runs with their curves, points (the most of a curve), final (losses by run)."""
    runs = [run for arm in subject.arms for run in subject.runs[arm.name]]
    most = max(_FEWEST, min(_MOST, _ALL // max(len(runs), 1)))
    drawn = [_run(run, most) for run in runs]
    places = {arm.name: place for place, arm in enumerate(subject.arms)}
    for run, node in zip(runs, drawn, strict=True):
        node["arm"] = places[run.arm]
    finals, source = final_losses(subject.sweep) if subject.sweep else ({}, "")
    others = other_text(subject.sweep) if subject.sweep else []
    if source != DOCUMENTS:  # else they are of the same text all the same
        finals = {(arm, seed): None if arm in others else loss for (arm, seed), loss in finals.items()}
    for run, node in zip(runs, drawn, strict=True):
        node["final"] = _short(finals.get((run.arm, run.seed), node["last_held_out"]))
    return {
        "arms": [
            {
                "name": arm.name,
                "whole": subject.whole(arm.name),
                "other_text": arm.name in others,
                "stopped": subject.stopped.get(arm.name),
                "baseline": subject.sweep is not None and arm.name == subject.sweep.baseline,
            }
            for arm in subject.arms
        ],
        "seeds": subject.sweep is not None and len(subject.sweep.seeds) > 1,
        "thinned": any(node["thinned"] for node in drawn),
        "points": most,
        "charts": _charts(drawn, subject.sweep is not None),
        "runs": drawn,
    }


def _run(run: RunResult, most: int) -> dict[str, Any]:
    costs = Costs([dict(line) for line in run.lines])
    trained = [line for line in run.lines if line.get("loss") is not None]
    held = [line for line in run.lines if (line.get("validation") or {}).get("loss") is not None]
    groups = []
    if trained:
        kept = _thin(trained, most)
        values: dict[str, list[Any]] = {"loss": [line["loss"] for line in kept]}
        for key, name in (("tokens_per_second", "speed"), ("mfu", "mfu"), ("lr", "lr")):
            values[name] = [line.get(key) for line in kept]
        memory = [line.get("cuda_peak_bytes", line.get("host_memory_bytes")) for line in kept]
        values["memory"] = [None if value is None else value / _GIB for value in memory]
        values |= _streams("training", [line.get("streams", {}) for line in kept])
        groups.append(_group(costs, kept, values))
    if held:
        kept = _thin(held, most)
        values = {"held_out": [line["validation"]["loss"] for line in kept]}
        values |= _streams("held-out", [line["validation"].get("streams", {}) for line in kept])
        groups.append(_group(costs, kept, values))
    scored = score_lines(run)
    for name in sorted({name for line in scored for name in line["scores"]}):
        having = sorted((line for line in scored if name in line["scores"]), key=lambda line: line["tokens"])
        groups.append(_group(costs, having, {f"score {name}": [line["scores"][name] for line in having]}))
    counts = seen(run)
    total = sum(each["tokens"] for each in counts.values())
    return {
        "seed": run.seed,
        "state": run.state,
        "groups": groups,
        "mixture": {name: _short(each["tokens"] / total) for name, each in counts.items()} if total else {},
        "last_held_out": held[-1]["validation"]["loss"] if held else None,
        "thinned": max(len(trained), len(held)) > most,
    }


def _streams(kind: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for streams in lines for name in streams)
    return {f"{kind} stream {name}": [streams.get(name, {}).get("loss") for streams in lines] for name in names}


def _group(costs: Costs, lines: Sequence[Mapping[str, Any]], values: dict[str, list[Any]]) -> dict[str, Any]:
    """Curves over the same points. A curve without any number is left out."""
    at = costs.at([line["tokens"] for line in lines])
    known = {name: each for name, each in values.items() if any(value is not None for value in each)}
    x = {axis: [_short(value) for value in at[axis]] for axis in AXES}
    return {"x": x, "y": {name: [_short(value) for value in each] for name, each in known.items()}}


def _charts(runs: Sequence[Mapping[str, Any]], compared: bool) -> list[dict[str, str]]:
    keys = list(dict.fromkeys(key for run in runs for group in run["groups"] for key in group["y"]))
    charts = [("held_out", "Held-out loss", "nats per masked token")] if "held_out" in keys else []
    charts += [("loss", "Training loss", "nats per masked token")] if "loss" in keys else []
    if any(run["final"] is not None for run in runs):
        charts.append(("pareto", "Held-out loss against cost", "nats per masked token"))
    for kind in ("held-out", "training"):
        start = f"{kind} stream "
        charts += [(key, f"{key[len(start) :]}: {kind} loss", "nats") for key in keys if key.startswith(start)]
    charts += [(key, key.removeprefix("score "), "score") for key in keys if key.startswith("score ")]
    if any(run["mixture"] for run in runs):
        charts.append(("mixture", "Mixture so far", "share of tokens"))
    others = (
        ("speed", "Throughput", "real tokens/s"),
        ("mfu", "MFU", "share of the peak"),
        ("memory", "Memory", "GiB"),
        ("lr", "Learning rate", ""),
    )
    charts += [each for each in others if each[0] in keys]
    if compared and "held_out" in keys:
        charts.insert(0, ("gap", "Held-out loss less the baseline's, same seed", "nats; below zero is better"))
    return [{"key": key, "title": title, "unit": unit} for key, title, unit in charts]


def _thin(lines: Sequence[Any], most: int) -> list[Any]:
    """Lines at even distances, the first and the last among them: each is one that the run wrote, none is a mean."""
    if len(lines) <= most:
        return list(lines)
    return [lines[place] for place in np.unique(np.linspace(0, len(lines) - 1, most).round().astype(int))]


def _short(value: float | None) -> float | int | None:
    """Six digits: they are what a picture and its table show."""
    if value is None or not np.isfinite(value):
        return None
    return int(value) if float(value).is_integer() else float(f"{value:.6g}")
