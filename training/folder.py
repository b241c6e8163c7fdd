"""The run folder: who may write to it, what made it, and whether its run is finished."""

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from omegaconf import OmegaConf

from durable import lock, remove_unfinished, write_file
from schema import ConfigError
from training.checkpoint import list_checkpoints
from training.config import RunConfig, read_recorded_config
from training.phases import PhasePlan

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
# What may differ between the start of a run and its resumption: it changes speed and logs, not the weights' history.
_FREE = (
    "runs",
    "imports",  # where the files lie; what they register is named, and compared, in its own place
    "trainer.microbatch_size",  # with attention.probs_dropout other masks are drawn, as with another number of ranks
    "trainer.parallelism",
    "trainer.log_interval",
    "trainer.compile",
    "trainer.activation_checkpointing",
    "trainer.max_bad_steps",
    "trainer.spike_guard",  # what it skipped is in the ledger, whatever it says now
    "trainer.hang_timeout",
    "trainer.peak_flops",
    "trainer.price_per_hour",
    "checkpoint",
    "wandb",
    "data.num_workers",
    "data.remote",
    "data.prefetch_batches",
    "data.cache",
    "data.cache_limit",
    "data.download_retries",
    "data.download_timeout",
)
# What others read of a summary.
_SUMMARY = {"steps", "tokens", "tokens_per_second", "packing_efficiency", "validation", "stream_tokens", "export"}


class RunFolder:
    """runs/NAME: config.yaml, environment.json, metrics.jsonl, ledger.jsonl, checkpoints/, first_checkpoint.json,
    exports/, tensorboard/, summary.json, curves.png, and of a branch origin.json."""

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

    def checkpoints_gone(self) -> bool:
        """Whether the run has had checkpoints and none is left."""
        return self.first_checkpoint.exists() and not list_checkpoints(self.checkpoints)

    def check_checkpoints(self) -> None:
        """Raises ConfigError when its checkpoints are gone: it would begin at step 0."""
        if self.checkpoints_gone():
            raise ConfigError(
                f"{self.checkpoints}: its checkpoints are gone: restore them, or remove {self.path} to start over, or "
                "give the run another name"
            )

    def recorded_config(self) -> RunConfig:
        """The config that the run was last started with. Raises ConfigError when this is no run folder."""
        file = self.path / "config.yaml"
        if not file.exists():
            raise ConfigError(f"{self.path}: no run folder (it holds no config.yaml): give runs/NAME")
        return read_recorded_config(file)

    def check_config(self, config: RunConfig) -> None:
        """Raises ConfigError naming what differs when the folder was begun with a config that trains otherwise."""
        file = self.path / "config.yaml"
        if not file.exists():
            return
        before, now = (_flatten(_resolved(each)) for each in (self.recorded_config(), config))
        changed = [
            f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(_FREE)
        ]
        if changed:
            raise ConfigError(
                f"{file}: this run was started otherwise: {'; '.join(changed)}: undo that, or give the run another name"
            )

    def open(self, config: RunConfig) -> None:
        """Create or re-enter the folder (rank 0): lock it, clear torn leftovers, record config and environment.

        Raises RunError when a live process trains here.
        """
        for folder in (self.path, self.checkpoints, self.exports):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.lock, self.path, "training this run")
        for folder in (self.path, self.checkpoints, self.exports):
            remove_unfinished(folder)
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


def _resolved(config: RunConfig) -> dict[str, Any]:
    """Its JSON form, with every min_length of a stream as a number: what is not said has come to mean another thing."""
    node = config.model_dump(mode="json")
    for share in node["data"]["streams"].values():
        share["min_length"] = share["min_length"] or 0
    for phase, resolved in zip(node["phases"], PhasePlan(config).phases, strict=True):
        for name, share in (phase["streams"] or {}).items():
            share["min_length"] = (resolved.streams or {})[name].min_length
    return node


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts and lists by dotted key."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if items is None:
        return {prefix: node}
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves
