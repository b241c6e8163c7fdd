"""`main.py speedrun verify RUN...`: whether finished runs keep to a track and reach its loss, and in what time."""

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from callbacks.ledger import nearest_line
from data.feed.loader import open_streams
from flexbert import from_hf
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from recipe.track import Track
from training.document_losses import HeldOutDocuments
from training.folder import RunFolder, history


@dataclass(frozen=True)
class Entry:
    """A finished run. loss: recomputed from its export. seconds: of training. faults: rules that it breaks."""

    path: Path
    seed: int
    loss: float
    seconds: float
    faults: list[str]


def verify(runs: Sequence[Path], track: Track, console: Console) -> bool:
    """Print a line for each run and the verdict; whether they are a record's worth.

    Raises ConfigError for a run that is not finished, is given twice, trained with a seed of another, or differs in
    more.
    """
    resolved = [path.resolve() for path in runs]
    if twice := next((path for path in resolved if resolved.count(path) > 1), None):
        raise ConfigError(f"{twice}: is given twice")
    entries = [_read(path, track) for path in runs]
    _check_alike(runs)
    for number, entry in enumerate(entries):
        if other := next((each for each in entries[:number] if each.seed == entry.seed), None):
            raise ConfigError(
                f"{entry.path}: has the seed of {other.path}, {entry.seed}: runs of a record differ in it"
            )
    table = Table("run", "seed", "held-out loss", "training seconds", "rules")
    for entry in entries:
        rules = "; ".join(entry.faults) or "kept"
        table.add_row(str(entry.path), f"{entry.seed}", f"{entry.loss:.4f}", f"{entry.seconds:.1f}", rules)
    console.print(table)
    losses, seconds = np.array([each.loss for each in entries]), np.array([each.seconds for each in entries])
    p = chance(losses, track.target_loss)
    shown = "needs two runs at least" if math.isnan(p) else f"p = {p:.2g}"
    console.print(
        f"{track.name}: mean loss {losses.mean():.4f}, target under {track.target_loss:g}: {shown}, wanted under "
        f"{track.significance:g}; mean time {seconds.mean():.1f} s",
        soft_wrap=True,
    )
    fine = p < track.significance and not any(entry.faults for entry in entries)
    console.print("verified" if fine else "not verified")
    return fine


def chance(losses: np.ndarray, target: float) -> float:
    """p of losses whose mean is so far under the target, were the true mean the target: Student's t, one-sided. NaN of
    one run."""
    if len(losses) < 2:
        return math.nan
    if not np.ptp(losses):  # t has no size
        return float(losses[0] >= target)
    found: Any = stats.ttest_1samp(losses, target, alternative="less")
    return float(found.pvalue)


def _read(path: Path, track: Track) -> Entry:
    folder = RunFolder(path)
    config, summary = folder.recorded_config(), folder.finished()
    if summary is None:
        raise ConfigError(f"{path}: is not finished: the same command that began it goes on")
    if "train_seconds" not in summary:
        raise ConfigError(f"{path}: its summary.json does not tell train_seconds: run it with this version")
    export = folder.exports / Path(summary["export"] or "").name
    if not (export / "config.json").is_file():
        raise ConfigError(f"{path}: its export {export} is gone: restore it, as the run wrote it")
    faults = [*_faults(config, track), *_machine(folder, track), *_data(config, folder, track)]
    return Entry(path, config.seed, held_out_loss(config, export, track), float(summary["train_seconds"]), faults)


def _check_alike(runs: Sequence[Path]) -> None:
    """Raises ConfigError for a run that trained otherwise than the first, but for its seed."""
    recipes = [_recipe(RunFolder(path).recorded_config()) for path in runs]
    first = recipes[0]
    for path, recipe in zip(runs, recipes, strict=True):
        for key in sorted(first.keys() | recipe.keys()):
            if first.get(key) != recipe.get(key):
                raise ConfigError(
                    f"{path}: {key} is {recipe.get(key)!r}, of {runs[0]} {first.get(key)!r}: runs of a record differ "
                    "in their seed alone"
                )


def _recipe(config: RunConfig) -> dict[str, Any]:
    guard = config.trainer.spike_guard
    left_out = {
        "trainer.skip_steps": sorted({step for steps in config.trainer.skipped for step in steps}),
        "trainer.spike_guard": guard and guard.model_dump(),
    }
    return {**history(config), **left_out, "seed": None}


def _faults(config: RunConfig, track: Track) -> list[str]:
    """What a run brings along beside the track's text."""
    faults = []
    if config.origin is not None:
        faults.append(f"from: starts from {config.origin.checkpoint}")
    if config.model.init.name == "grow":
        faults.append("model.init: grows from another model")
    for number, phase in enumerate(PhasePlan(config).phases):
        if (teacher := getattr(phase.objective, "teacher", None)) is not None:
            faults.append(f"phases[{number}].objective: learns from {teacher}")
    return faults


def _machine(folder: RunFolder, track: Track) -> list[str]:
    """Of the process that trained last: earlier ones are not recorded."""
    file = folder.path / "environment.json"
    try:
        machine: dict[str, Any] = json.loads(file.read_text())
        ranks, devices = int(machine["world_size"]), len(machine["devices"])
        threads = int(machine["torch_threads"]) * ranks
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{file}: missing or damaged: restore it, as the run wrote it") from None
    faults = []
    if track.cores is not None and threads > track.cores:
        faults.append(f"{threads} threads, {track.cores} are allowed")
    if devices > track.gpus:
        faults.append(f"{devices} GPUs, {track.gpus} are allowed")
    return faults


def _data(config: RunConfig, folder: RunFolder, track: Track) -> list[str]:
    """Of the shards that were trained on, as the run noted them, and of the held-out ones that lie there now."""
    line = nearest_line(folder.ledger, PhasePlan(config).total_steps)
    if line is None or "data" not in line:
        raise ConfigError(f"{folder.ledger}: missing or damaged: restore it, as the run wrote it")
    held_out = zip(config.data.streams, open_streams(config.data, "validation"), strict=True)
    found = {"train": line["data"], "validation": {name: stream.fingerprint for name, stream in held_out}}
    faults = []
    for split, allowed in (("train", track.streams), ("validation", track.validation)):
        for name, fingerprint in found[split].items():
            if allowed.get(name) != fingerprint:
                faults.append(f"{name}/{split}: {fingerprint}, the track's is {allowed.get(name)}")
    faults += [f"{name}/validation: is missing" for name in track.validation if name not in config.data.streams]
    return faults


def held_out_loss(config: RunConfig, export: Path, track: Track) -> float:
    """Nats a hidden token of the exported weights over the validation splits of the run's streams, as the track
    measures it."""
    options = track.held_out.model_dump()
    masking = {"name": "tokens", "rate": options.pop("rate"), "mask_fraction": 1.0, "random_fraction": 0.0}
    plan = PhasePlan(config)
    with tempfile.TemporaryDirectory() as scratch:
        measure = HeldOutDocuments(
            HeldOutDocuments.Config.model_validate({**options, "masking": masking}),
            run=config,
            plan=plan,
            streams=(),
            folder=Path(scratch),
        )
        return float(measure.run(from_hf(export).eval(), plan.total_steps)["loss"])
