"""What the train command does for a run whose steps are done."""

import logging
from pathlib import Path
from typing import Any

from rich.console import Console

import ranks
from callbacks.ledger import Ledger
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from training.checkpoints.files import list_checkpoints
from training.checkpoints.remote import RemoteCheckpoints
from training.folder import RunFolder
from training.publisher import Publisher

log = logging.getLogger(__name__)


def summary_of(
    plan: PhasePlan,
    ledger: Ledger,
    validation: dict[str, Any],
    export: Path,
    train_seconds: float,
    seconds: float,
    origin: dict[str, Any] | None,
) -> dict[str, Any]:
    """What summary.json says of a run whose steps are done. validation: of the final weights. seconds: with
    evaluations and saving. origin: what origin.json holds, of a branch."""
    stream_tokens = ledger.real_tokens()
    tokens = sum(stream_tokens.values())
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / train_seconds,
        "packing_efficiency": tokens / plan.total_tokens,
        "validation": validation,
        "validation_before": origin and origin.get("validation"),  # older branches did not measure it
        "stream_tokens": stream_tokens,
        "streams": ledger.totals(),
        "steps": plan.total_steps,
        "export": str(export) if export.exists() else None,
        "seconds": seconds,
        "train_seconds": train_seconds,
    }


def nothing_to_train(config: RunConfig, folder: RunFolder, rank: int) -> dict[str, Any] | None:
    """The summary of a run that has no step and no export left to make; None: train. A collective: all do what rank 0
    sees. A network file system may show others an older folder for a minute, and they would wait for those that are
    done. Raises ConfigError when the summary cannot be read."""
    found: tuple[dict[str, Any] | None, str | None] = (None, None)
    if rank == 0:
        try:
            summary = folder.finished()
        except ConfigError as error:
            found = None, str(error)
        else:
            more = summary is not None and summary["steps"] < PhasePlan(config).total_steps  # a phase was added
            if summary is not None and not more and not export_gone(folder, summary):
                found = summary, None
    summary, problem = ranks.from_rank_0(found)
    if problem is not None:
        raise ConfigError(problem)
    return summary


def export_gone(folder: RunFolder, summary: dict[str, Any]) -> bool:
    """Whether a finished run's last export is to be written again: it is not there, and a checkpoint is. Says so."""
    export = _export(folder, summary)
    gone = export is not None and not export.exists() and bool(list_checkpoints(folder.checkpoints))
    if gone:
        log.warning("%s: is gone: it is written again from the last checkpoint", export)
    return gone


def settle_finished(
    config: RunConfig, folder: RunFolder, summary: dict[str, Any], rank: int, console: Console
) -> dict[str, Any]:
    """Say that the run is finished; copy to checkpoint.remote, and publish, what is not there yet (rank 0). Returns the
    summary, with `export` where it lies now, or None.

    Raises RunError when the copy fails.
    """
    export = _export(folder, summary)
    if export is not None and not export.exists():
        export = None
    if rank == 0:
        done = f"{folder.path}: this run is finished ({summary['steps']} steps)"
        console.print(f"{done}; {_copy(config, folder) or 'nothing to do'}", highlight=False, soft_wrap=True)
        Publisher(config, folder.path, rank).finish(lambda text: console.print(text, highlight=False, soft_wrap=True))
    return {**summary, "export": None if export is None else str(export)}


def _export(folder: RunFolder, summary: dict[str, Any]) -> Path | None:
    """In the run's folder as it is now called."""
    return folder.exports / Path(summary["export"]).name if summary["export"] else None


def _copy(config: RunConfig, folder: RunFolder) -> str | None:
    """What was copied, None when nothing was to be."""
    newest = list_checkpoints(folder.checkpoints)[-1:]
    if config.checkpoint.remote is None:
        return None
    remote, plan = RemoteCheckpoints(config), PhasePlan(config)
    if not newest:
        return f"it has no checkpoint that could be copied to {remote.url}"
    is_permanent = lambda step: plan.is_permanent(step, config.checkpoint.keep_every)  # noqa: E731
    remote.copy(newest[0], config.checkpoint, is_permanent, written=False)
    return f"{newest[0].name} is copied to {remote.url}"
