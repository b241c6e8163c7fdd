"""The run folder: who may write to it, what made it, and whether its run is finished."""

import json
import logging
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from omegaconf import OmegaConf
from pydantic import BaseModel

from callbacks.step_log import read_lines
from flexbert_core.durable import holder, lock, remove_unfinished, write_file
from flexbert_core.folders import no_run
from flexbert_core.schema import MAY_CHANGE, ConfigError
from recipe.config import RunConfig, read_recorded_config
from recipe.phases import PhasePlan
from training.checkpoints.files import list_checkpoints, tokens_of

log = logging.getLogger(__name__)
_PACKAGES = (
    "torch",
    "mosaicml",
    "mosaicml-streaming",
    "transformers",
    "tokenizers",
    "torch-optimi",
    "numpy",
    "safetensors",
)
# What others read of a summary.
_SUMMARY = {"steps", "tokens", "tokens_per_second", "packing_efficiency", "validation", "stream_tokens", "export"}


class RunFolder:
    """runs/NAME: config.yaml, environment.json, metrics.jsonl, ledger.jsonl, checkpoints/, first_checkpoint.json,
    exports/, tensorboard/, summary.json, curves.png, after a divergence diverged.json, of a branch origin.json, with
    `distill` teacher.json, and with `publish` publish.json and publish.log."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.first_checkpoint = path / "first_checkpoint.json"
        self.exports = path / "exports"
        self.metrics = path / "metrics.jsonl"
        self.ledger = path / "ledger.jsonl"
        self.summary = path / "summary.json"
        self.origin = path / "origin.json"
        self.curves = path / "curves.png"
        self.divergence = path / "diverged.json"
        self.lock = path / ".lock"
        self._lock: TextIO | None = None

    def finished(self) -> dict[str, Any] | None:
        """The summary of a finished run, else None. Raises ConfigError when it cannot be read."""
        if not self.summary.exists():
            return None
        try:
            summary = json.loads(self.summary.read_text())
        except (OSError, ValueError):
            summary = None
        if not isinstance(summary, dict) or not summary.keys() >= _SUMMARY:
            raise ConfigError(
                f"{self.summary}: damaged: remove it, then `train` writes it again from the last checkpoint"
            )
        return summary

    def note_checkpoint(self, path: Path) -> None:
        """Remember for ever that the run has had a whole checkpoint, the first one (rank 0).

        Neither metrics.jsonl nor ledger.jsonl can tell: a run that a kill ends before its first checkpoint is whole has
        lines in both, and must start again by itself.
        """
        if not self.first_checkpoint.exists():
            write_file(self.first_checkpoint, json.dumps({"checkpoint": path.name}))

    def note_divergence(self, why: str) -> None:
        """Remember until the run is started again that it has ended so (rank 0). Its exit code tells this from no other
        failure, and launchers and clusters have codes of their own."""
        write_file(self.divergence, json.dumps({"why": why}))

    def say_lost_steps(self) -> None:
        """Warn that steps are trained again, where the run had some and no checkpoint."""
        lost = max((line["step"] for line in read_lines(self.metrics)), default=0)
        if lost:
            log.warning(
                "STARTING AGAIN AT STEP 0: %s had trained %d steps, and was ended before its first checkpoint",
                self.path,
                lost,
            )

    def checkpoints_gone(self) -> bool:
        """Whether the run has had checkpoints and none is left."""
        return self.first_checkpoint.exists() and not list_checkpoints(self.checkpoints)

    def check_checkpoints(self, gone: bool) -> None:
        """Raises ConfigError when its checkpoints are gone: it would begin at step 0. gone: `checkpoints_gone`."""
        if gone:
            raise ConfigError(
                f"{self.checkpoints}: its checkpoints are gone: restore them, or remove {self.path} to start over, or "
                "give the run another name"
            )

    def state(self, trained: bool) -> str:
        """training, finished, checkpoints gone, diverged, stopped (the same command goes on), or not started. trained:
        whether its metrics have a line of training. Takes no lock."""
        if holder(self.lock) is not None:
            return "training"
        if self.finished() is not None:
            return "finished"
        if self.checkpoints_gone():
            return "checkpoints gone"
        if self.divergence.exists():
            return "diverged"
        return "stopped" if trained or list_checkpoints(self.checkpoints) else "not started"

    def recorded_config(self) -> RunConfig:
        """The config that the run was last started with. Raises ConfigError when this is no run folder."""
        file = self.path / "config.yaml"
        if not file.exists():
            raise ConfigError(no_run(self.path))
        return read_recorded_config(file)

    def trained_steps(self, config: RunConfig) -> int:
        """Steps of the newest checkpoint, whole or not. config: as recorded."""
        found = list_checkpoints(self.checkpoints)
        return PhasePlan(config).step_at(tokens_of(found[-1])) if found else 0

    def check_config(self, config: RunConfig, *, phases_too: bool = False) -> list[str]:
        """What differs in phases to come, and is taken. Raises ConfigError naming what else differs, when the folder
        was begun with a config that trains otherwise. phases_too: none may differ."""
        file = self.path / "config.yaml"
        if not file.exists():
            return []
        recorded = self.recorded_config()
        if config.origin is not None and recorded.origin is None and list_checkpoints(self.checkpoints):
            raise ConfigError(
                f"from: {config.origin.checkpoint}: {self.path} has begun without it, and would not read it: leave it "
                "out, or begin a run of another name"
            )
        named = {
            number
            for each in (recorded, config)
            for number, phase in enumerate(each.phases)
            if phase.objective is not None
        }
        before, now = (history(each) | _objectives(each, named) for each in (recorded, config))
        keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        # Of another component the name says it all; a phase's is a title.
        others = tuple(key.removesuffix("name") for key in keys if key.endswith(".name") and not _is_title(key))
        keys = [key for key in keys if key.endswith(".name") or not key.startswith(others or "\n")]
        trained, plan = self.trained_steps(recorded), PhasePlan(recorded)
        begun = plan.phases.index(plan.at(max(trained - 1, 0)))
        free = [key for key in keys if not phases_too and _is_to_come(key, begun)]
        told = {key: f"{key} was {_shown(before.get(key))}, now {_shown(now.get(key))}" for key in keys}
        refused = [said for key, said in told.items() if key not in free]
        if refused:
            why = f" (it stands at step {trained}, in phases[{begun}], {plan.phases[begun].name})" if trained else ""
            raise ConfigError(
                f"{file}: this run was started otherwise{why}: {'; '.join(refused)}: undo that; or begin a run of "
                f"another name, from the data's beginning, or with `from: {self.path}` from where this one stands"
            )
        if config.origin is not None and self.origin.exists():
            if recorded.origin != config.origin:
                where = config.origin.checkpoint
                log.warning("from: %s: is not read any more: this run has begun, see %s", where, self.origin)
            if recorded.tokens != config.tokens:
                log.warning("tokens: is not read any more: this run has begun, see %s", self.origin)
        self._check_skipped(config, recorded, trained)
        return [told[key] for key in free]

    def _check_skipped(self, config: RunConfig, recorded: RunConfig, trained: int) -> None:
        here, there = (
            {step for steps in each.trainer.skipped for step in steps if step <= trained} for each in (config, recorded)
        )
        if here != there:
            step = min(here ^ there)
            how = "trained" if step in here else "left out"
            raise ConfigError(
                f"trainer.skip_steps: step {step} of {self.path} has been {how} already (it stands at step {trained}): "
                "change steps to come; or begin a run of another name with `from` a checkpoint before it"
            )

    def open(self, config: RunConfig) -> None:
        """Create or re-enter the folder (rank 0): lock it, clear torn leftovers, record config and environment.

        What was finished is no more when a phase has been added. Raises RunError when a live process trains here.
        """
        for folder in (self.path, self.checkpoints, self.exports):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.lock, self.path, "training this run")
        for folder in (self.path, self.checkpoints, self.exports):
            remove_unfinished(folder)
        summary = self.finished()
        if summary is not None and summary["steps"] < PhasePlan(config).total_steps:
            self.summary.unlink()
        self.divergence.unlink(missing_ok=True)
        write_file(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))
        write_file(self.path / "environment.json", json.dumps(environment(), indent=1))

    def close(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def environment() -> dict[str, Any]:
    """Versions, commit and machine of this process."""
    import torch

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    return {
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def history(config: RunConfig) -> dict[str, Any]:
    """By dotted key, what decides what is trained and measured."""
    return _history(config) | _min_lengths(config) | {"data.lanes": config.lanes}


def _history(node: Any, prefix: str = "") -> dict[str, Any]:
    """By dotted key, the leaves of a config that decide what is trained and measured: those not MAY_CHANGE."""
    if isinstance(node, BaseModel):
        fields = type(node).model_fields.items()
        kept = [(name, field) for name, field in fields if field.json_schema_extra != MAY_CHANGE]
        items = [(field.alias or name, getattr(node, name)) for name, field in kept]
    elif isinstance(node, Mapping):
        items = list(node.items())
    elif isinstance(node, list | tuple):
        items = list(enumerate(node))
    else:
        return {prefix: node}
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves |= _history(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def _min_lengths(config: RunConfig) -> dict[str, Any]:
    """By dotted key, every min_length of a stream as a number: a phase that says none has that of the one before."""
    lengths: dict[str, Any] = {
        f"data.streams.{name}.min_length": share.min_length or 0 for name, share in config.data.streams.items()
    }
    for number, (phase, resolved) in enumerate(zip(config.phases, PhasePlan(config).phases, strict=True)):
        for name in phase.streams or {}:
            lengths[f"phases.{number}.streams.{name}.min_length"] = (resolved.streams or {})[name].min_length
    return lengths


def _objectives(config: RunConfig, numbers: Iterable[int]) -> dict[str, Any]:
    """By dotted key, what phases of these numbers are trained to do, said or inherited; one behind the last would do
    what that does."""
    phases, leaves = PhasePlan(config).phases, dict[str, Any]()
    for number in numbers:
        place = f"phases.{number}.objective"
        leaves |= {place: None} | _history(phases[min(number, len(phases) - 1)].objective, place)
    return leaves


def _shown(value: object) -> str:
    return "not set" if value is None else repr(value)


def _is_title(key: str) -> bool:
    """Whether a key that ends in `name` names no component."""
    return re.fullmatch(r"phases\.[0-9]+\.name", key) is not None


def _is_to_come(key: str, begun: int) -> bool:
    """Whether a key is of a phase behind the begun one, and may still change. An objective may train a model beside
    this one, which the checkpoints then hold: it is settled when the run begins."""
    parts = key.split(".")
    return parts[0] == "phases" and int(parts[1]) > begun and parts[2] != "objective"
