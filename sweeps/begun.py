"""A run of a sweep that has begun stays what its arm says. A run by itself takes other values of many keys when it goes
on, since it does not read them again, or since only speed changes. Beside other runs of a sweep they say what the arm
is: where it started, on which data, or how many rows at a time it was trained on."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from data.feed.loader import open_streams
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig
from sweeps.arms import difference, lies_in
from training.checkpoints.files import list_checkpoints
from training.folder import RunFolder, history

# What may change in the course of a sweep, unless an arm says it.
_FREE = (
    "imports",  # where files lie; what they register is compared by its name, in its own place
    "data.tokenizer",  # where it lies; the streams' fingerprints hold its own
    "data.cache",
    "data.cache_limit",
    "data.download_retries",
    "data.download_timeout",
    "data.num_workers",
    "data.prefetch_batches",
    "checkpoint",  # when and where the state is saved
    "publish",
    "loggers",
    "callbacks",  # they watch
    "evaluations",  # they measure beside; of held_out_documents, which all arms are compared by, see below
    "evaluation.interval",
    "trainer.log_interval",
    "trainer.max_bad_steps",
    "trainer.hang_timeout",
    "trainer.peak_flops",
    "trainer.price_per_hour",
    # Speed and memory: the same up to rounding.
    "evaluation.batch_size",
    "model.attention.backend",
    "trainer.parallelism",
    "trainer.microbatch_size",
    "trainer.microbatch_tokens",
    "trainer.compile",
    "trainer.activation_checkpointing",
    "trainer.deterministic",
)


def check_begun(config: RunConfig, said: Collection[str]) -> None:
    """Raises ConfigError when the run has begun with other values of what its arm is.

    said: config paths that its arm or the baseline sets. What training itself refuses to change is left to
    `RunFolder.check_config`. Data that lie elsewhere are the same when their fingerprints are.
    """
    folder = RunFolder(config.folder)
    checkpoints = list_checkpoints(folder.checkpoints)
    if folder.finished() is None and not checkpoints:
        return  # it begins anew
    changed = changed_meaning(folder.recorded_config(), config, said)
    paths = [path for path in changed if path.startswith("data.streams.") and path.endswith(".path")]
    if paths and checkpoints and _same_data(config, checkpoints[-1]):
        changed = {path: sides for path, sides in changed.items() if path not in paths}
    if changed:
        told = "; ".join(f"{path} was {was!r}, now {now!r}" for path, (was, now) in changed.items())
        raise ConfigError(
            f"{folder.path / 'config.yaml'}: this run was begun as another arm: {told}: undo that, or give the arm "
            "another name, or the sweep another folder"
        )


def changed_meaning(recorded: RunConfig, config: RunConfig, said: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """By config path what was and what is, of keys that a run by itself may change and a run of a sweep may not. said:
    as in `check_begun`."""
    decided = history(recorded).keys() | history(config).keys()
    changed = {
        path: sides
        for path, sides in difference(recorded, config).items()
        if path not in decided and not (any(lies_in(path, key) for key in _FREE) and not _says(said, path))
    }
    before, now = (_held_out_documents(each) for each in (recorded, config))
    if before != now:
        changed["evaluations.held_out_documents"] = (before, now)
    return changed


def _says(said: Collection[str], path: str) -> bool:
    return any(lies_in(path, own) for own in said)


def _held_out_documents(config: RunConfig) -> list[dict[str, Any]]:
    return [each.model_dump(mode="json") for each in config.evaluations if each.name == "held_out_documents"]


def _same_data(config: RunConfig, checkpoint: Path) -> bool:
    """Whether the streams where they lie now are those of a checkpoint, by their fingerprints."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())["run"]
        splits = [("train", state["data"]), ("validation", state["validation_data"])]
        return all(
            dict(zip(config.data.streams, (each.fingerprint for each in open_streams(config.data, split)), strict=True))
            == fingerprints
            for split, fingerprints in splits
        )
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return False
