"""How a run stands, read from its folder alone: live or dead, near or done. Writes nothing and holds no lock."""

import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from callbacks.step_log import flat, shown
from evals.following import read_evaluations
from flexbert_core.durable import holder
from flexbert_core.schema import RunError
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from training.checkpoints.files import list_checkpoints, tokens_of, verify_checkpoint
from training.folder import RunFolder

_BLOCK = 1 << 16
_LINES = 100  # of metrics.jsonl that are looked through for what other callbacks log
_OURS = ("streams", "rope_theta", "validation", "validation_ema")


def status(path: Path, as_json: bool, console: Console) -> None:
    """Print where a run stands. Raises ConfigError when `path` is no run folder."""
    facts = read_status(path)
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=1) + "\n")
    else:
        console.print(_table(facts))


def read_status(path: Path) -> dict[str, Any]:
    """Plain values, null where nothing is known yet:

    state ("training", "finished", "stopped", "checkpoints gone", "not started"), process (its id, of the host that
    trains), phase, step, steps, tokens, total_tokens, loss, tokens_per_second, eta_seconds (else what it would take
    from here), last_line_age_seconds, metrics (the newest line), others (what callbacks of the user's log: the newest
    value of each in the last lines), checkpoint {path, tokens, whole, problem,
    age_seconds}, checkpoints (how many there are), validation (the newest), mixture {stream: share of real tokens so
    far}, evaluations (those made beside it: the newest {step, tokens, scores or failed} of each by its name).
    """
    folder = RunFolder(path)
    config = folder.recorded_config()
    plan, process, summary = PhasePlan(config), holder(folder.lock), folder.finished()
    line = next((line for line in _backwards(folder.metrics) if "loss" in line), {})
    validation = next((line for line in _backwards(folder.metrics) if "validation" in line), None)
    evaluations = {line["evaluation"]: line for line in read_evaluations(path)}
    # A line that a kill left behind the newest checkpoint is trained again, but it is the last that is known.
    step = plan.total_steps if summary else line.get("step", 0)
    state = folder.state(trained=bool(line))
    return {
        "run": str(path),
        "state": state,
        "process": process,
        "phase": plan.at(max(step - 1, 0)).name,
        "step": step,
        "steps": plan.total_steps,
        "tokens": plan.tokens_before(step),
        "total_tokens": plan.total_tokens,
        "loss": line.get("loss"),
        "tokens_per_second": line.get("tokens_per_second"),
        "eta_seconds": 0.0 if summary else line.get("eta_seconds"),
        "last_line_age_seconds": _age(folder.metrics),
        "metrics": line or None,
        "others": _others(folder, evaluations),
        **_checkpoint(folder),
        "validation": validation and {"step": validation["step"], **validation["validation"]},
        "mixture": _mixture(folder, config),
        "evaluations": evaluations,
    }


def _checkpoint(folder: RunFolder) -> dict[str, Any]:
    """The newest checkpoint, verified by its hashes."""
    for attempt in range(2):
        paths = list_checkpoints(folder.checkpoints)
        if not paths:
            break
        newest, problem = paths[-1], None
        try:
            verify_checkpoint(newest)
        except RunError as error:
            problem = str(error)
        # A live run may have removed it, for newer ones, while it was read.
        if newest.exists() or attempt:
            facts = {"path": str(newest), "tokens": tokens_of(newest), "whole": problem is None, "problem": problem}
            return {"checkpoint": facts | {"age_seconds": _age(newest)}, "checkpoints": len(paths)}
    return {"checkpoint": None, "checkpoints": 0}


def _mixture(folder: RunFolder, config: RunConfig) -> dict[str, float] | None:
    """Share of each stream in the tokens of the newest line of the ledger that counts them."""
    line = next((line for line in _backwards(folder.ledger) if "streams" in line), None)
    if line is None:
        return None
    tokens = {name: line["streams"][name]["tokens"] for name in config.data.streams if name in line["streams"]}
    total = sum(tokens.values())
    return {name: count / total for name, count in tokens.items()} if total else None


def _backwards(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of JSON lines, last first; one that is being written, or torn by a kill, is left out."""
    if not file.exists():
        return
    with file.open("rb") as handle:
        position, rest = handle.seek(0, os.SEEK_END), b""
        while position or rest:
            size = min(_BLOCK, position)
            position -= size
            handle.seek(position)
            first, *lines = (handle.read(size) + rest).split(b"\n")
            rest = first if position else b""
            for line in reversed(lines if position else [first, *lines]):
                try:
                    node = json.loads(line)
                except ValueError:
                    continue
                if isinstance(node, dict):
                    yield node


def _others(folder: RunFolder, made_beside: Iterable[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in itertools.islice(_backwards(folder.metrics), _LINES):
        theirs = {key: value for key, value in line.items() if isinstance(value, dict) and key not in _OURS}
        if "evaluations" in theirs:
            of_run = theirs["evaluations"].items()
            theirs["evaluations"] = {key: value for key, value in of_run if key not in made_beside}
        found = {name: value for key, node in theirs.items() for name, value in flat(node, key).items()} | found
    return found


def _age(path: Path) -> float | None:
    try:
        return max(time.time() - path.stat().st_mtime, 0.0)
    except OSError:
        return None


def _table(facts: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    state, age = facts["state"], facts["last_line_age_seconds"]
    if facts["process"] is not None:
        state += f" (process {facts['process']})"
    elif state == "stopped":
        state += ": the same `train` command goes on from the newest checkpoint"
    elif state == "diverged":
        state += ": diverged.json there says why"
    rows = {"run": facts["run"], "state": state}
    rows["phase"] = f"{facts['phase']}, step {facts['step']:,} of {facts['steps']:,}"
    rows["tokens"] = (
        f"{facts['tokens']:,} of {facts['total_tokens']:,} slots ({facts['tokens'] / facts['total_tokens']:.1%})"
    )
    line = facts["metrics"] or {}
    if facts["loss"] is not None:
        rows["loss"] = f"{facts['loss']:.4f} at step {line['step']:,}"
        rows["loss"] += f", {_duration(age)} ago" if age is not None else ""
    for name, scores in line.get("streams", {}).items():
        if scores["loss"] is None:
            continue
        rows[f"  {name}"] = f"{shown(scores['loss'], '.4f')}, masked accuracy {shown(scores['masked_accuracy'], '.1%')}"
    if facts["tokens_per_second"] is not None:
        rows["speed"] = f"{facts['tokens_per_second']:,.0f} tokens/s, {line['data_wait']:.1%} of the time without data"
        rows["speed"] += f", MFU {line['mfu']:.1%}" if "mfu" in line else ""
    if facts["eta_seconds"] is not None and state != "finished":
        rows["ETA"] = _duration(facts["eta_seconds"]) + ("" if facts["process"] is not None else " once it runs")
    if "cost" in line:
        rows["cost"] = f"{line['cost']:,.2f}, to the end {line['cost_to_end']:,.2f}"
    rows["checkpoint"] = "restore them: the run cannot go on" if state == "checkpoints gone" else "none yet"
    if checkpoint := facts["checkpoint"]:
        whole = (
            "whole" if checkpoint["whole"] else f"DAMAGED ({checkpoint['problem']}): the run will take the one before"
        )
        age = "" if checkpoint["age_seconds"] is None else f", {_duration(checkpoint['age_seconds'])} old"
        rows["checkpoint"] = f"{checkpoint['path']}: {whole}{age}; {facts['checkpoints']} kept"
    if validation := facts["validation"]:
        rows["validation"] = (
            f"after step {validation['step']:,}: loss {shown(validation['loss'], '.4f')}, "
            f"masked accuracy {shown(validation['masked_accuracy'], '.1%')}"
        )
    for name, made in facts["evaluations"].items():
        scores = ", ".join(f"{key} {value:.4g}" for key, value in made.get("scores", {}).items())
        rows[name] = f"after {made['tokens']:,} tokens: {scores or 'FAILED: ' + made.get('failed', '')}"
    if facts["others"]:
        rows["other metrics"] = ", ".join(f"{name} {value:.4g}" for name, value in facts["others"].items())
    if facts["mixture"]:
        rows["mixture so far"] = ", ".join(f"{name} {share:.1%}" for name, share in facts["mixture"].items())
    for key, value in rows.items():
        table.add_row(key, value)
    return table


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
