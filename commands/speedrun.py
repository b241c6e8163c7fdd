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

from data.feed.loader import open_streams
from flexbert import from_hf
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from recipe.track import Track
from training.document_losses import HeldOutDocuments
from training.folder import RunFolder


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

    Raises ConfigError for a run that is not finished, is given twice, or trained with a seed of another.
    """
    resolved = [path.resolve() for path in runs]
    if twice := next((path for path in resolved if resolved.count(path) > 1), None):
        raise ConfigError(f"{twice}: is given twice")
    entries = [_read(path, track) for path in runs]
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
        raise ConfigError(f"{path}: its export {export} is gone: `main.py train` with its run file writes it again")
    faults = [*_faults(config, track), *_machine(folder, track), *_data(config, track)]
    return Entry(path, config.seed, held_out_loss(config, export, track), float(summary["train_seconds"]), faults)


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
    machine: dict[str, Any] = json.loads((folder.path / "environment.json").read_text())
    ranks, devices = int(machine["world_size"]), len(machine["devices"])
    threads = int(machine["torch_threads"]) * ranks
    faults = []
    if track.cores is not None and threads > track.cores:
        faults.append(f"{threads} threads, {track.cores} are allowed")
    if devices > track.gpus:
        faults.append(f"{devices} GPUs, {track.gpus} are allowed")
    return faults


def _data(config: RunConfig, track: Track) -> list[str]:
    faults = []
    for split, allowed in (("train", track.streams), ("validation", track.validation)):
        streams = dict(zip(config.data.streams, open_streams(config.data, split), strict=True))
        for name, stream in streams.items():
            if allowed.get(name) != stream.fingerprint:
                faults.append(f"{name}/{split}: {stream.fingerprint}, the track's is {allowed.get(name)}")
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
