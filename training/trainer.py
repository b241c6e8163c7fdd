"""`train`: one run from start to end, in every process of it."""

import logging
import warnings
from typing import Any

import torch
from composer.utils import dist
from rich.console import Console

import ranks
from callbacks.guards import DivergedError
from callbacks.watchdog import Watchdog
from data.feed.workers import worker_death
from flexbert_core.schema import RunError
from recipe.config import RunConfig
from recipe.imports import blamed
from training import report, signals
from training.allocator import keep_freed_memory
from training.begun import as_begun
from training.checkpoints.remote import fetch_newest
from training.determinism import decide, describe
from training.faults import COLLECTIVE_MARGIN, lost_rank
from training.finished import nothing_to_train, settle_finished
from training.flight_recorder import record
from training.folder import RunFolder
from training.memory import out_of_memory
from training.run import Run

log = logging.getLogger(__name__)
_LIBRARIES = r"(?!(main|ranks|commands|sweeps|training|callbacks|recipe|data|flexbert|flexbert_core)(\.|$))"  # but ours


def quiet_libraries() -> None:
    """Silence what says nothing to the user of a run: what libraries tell one another. Our own are heard."""
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
    for name in ("composer", "streaming", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def train(config: RunConfig, console: Console) -> dict[str, Any]:
    """Run `config` to its end, from its newest whole checkpoint if it has one. Returns the summary.

    Raises as `train_until`.
    """
    summary = train_until(config, console, None)
    assert summary is not None
    return summary


def train_until(config: RunConfig, console: Console, tokens: int | None) -> dict[str, Any] | None:
    """The same, up to the first step that makes so many tokens (slots): it is measured and saved there, and trains on
    exactly as if it had never paused. None while the run has more to train.

    Raises ConfigError before anything is written when config and data do not fit; RunError for damage met on the way.
    """
    folder = RunFolder(config.folder)
    rank = ranks.rank()
    quiet_libraries()
    keep_freed_memory()
    config = as_begun(config, folder)
    folder.check_config(config)
    signals.listen()
    if torch.cuda.is_available() and ranks.world_size() > 1:
        record(folder.path)
    deterministic = decide(config.trainer.deterministic, ranks.world_size())
    # The watchdog speaks before a collective gives up by itself.
    timeout = config.trainer.hang_timeout
    dist.initialize_dist("gpu" if torch.cuda.is_available() else "cpu", timeout + COLLECTIVE_MARGIN)
    watchdog = Watchdog(timeout)
    run = None
    try:
        watchdog.meet()
        summary = nothing_to_train(config, folder, rank)
        if summary is not None:
            watchdog.stop()  # a copy may take longer than a step may
            return settle_finished(config, folder, summary, rank, console)
        signals.finish_steps()
        fetch_newest(config, folder, watchdog.beat)
        config = as_begun(config, folder)
        changes = folder.check_config(config)  # again: what came from afar may stand in a later phase
        folder.check_checkpoints(ranks.from_rank_0(folder.checkpoints_gone()))
        run = Run(config, console, watchdog, tokens)
        run.open()
        # On every rank, and before the first step: to choose a kernel of attention may mean to try one.
        kernels = describe(config, deterministic, run.bf16) if torch.cuda.is_available() else ""
        step = run.resume()
        if rank == 0:
            for change in changes:
                console.print(f"{folder.path}: to come: {change}", soft_wrap=True)
            begun = f"starting from {run.origin['from']}" if run.origin else "starting"
            if kernels:
                console.print(kernels, soft_wrap=True)
            where = f"resuming after step {step}" if step else begun
            console.print(
                f"{folder.path}: {where}, {run.plan.total_steps} steps, {report.describe_model(config)}",
                soft_wrap=True,
            )
            if run.origin and step == 0 and "vocabulary" in run.origin:
                console.print(f"{folder.path}: {report.describe_tokens(run.origin['vocabulary'])}", soft_wrap=True)
        run.fit(step)
        if run.end < run.plan.total_steps:
            run.pause(step)
            if rank == 0:
                done = max(step, run.end)
                console.print(
                    f"{folder.path}: paused after step {done} of {run.plan.total_steps}, "
                    f"{run.plan.tokens_before(done):,} tokens: the same command without --until goes on",
                    soft_wrap=True,
                )
            return None
        summary = run.finish()
    except DivergedError as error:
        if rank == 0:
            folder.note_divergence(str(error))
        raise
    except RuntimeError as error:  # PyTorch raises this in the training process at the moment when a worker dies
        done, microbatches = (0, None) if run is None else (run.steps_done, run.microbatches)
        full = out_of_memory(error, config, ranks.world_size(), done, microbatches)
        raise worker_death(error) or lost_rank(error) or full or error from None
    except OSError as error:
        if blamed(error) is not None:
            raise
        raise RunError(
            f"{folder.path}: {error.strerror or error}: {error.filename or ''} (checkpoints stay whole)"
        ) from error
    finally:
        try:
            if run is not None:
                run.close()
        finally:
            watchdog.stop()
    assert run is not None
    # With the folder free for others, and no watchdog: this may take longer than a step may.
    run.publisher.finish(lambda text: console.print(text, soft_wrap=True))
    return summary
