"""What torch.compile may and may not do in a run: compile for training, and never silently stop."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch._dynamo import config as dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit

from flexbert import FlexBertForMaskedLM
from recipe.phases import PhasePlan

log = logging.getLogger(__name__)
R = TypeVar("R")

# Code compiled for one size of a microbatch: of each kind of block one (first, global, local, last, with gradients and
# when computed again), and of the last, which runs for the tokens wanted, one for each sixteenth of the batch.
_KINDS = 12 + 16


def compile_blocks(model: FlexBertForMaskedLM, sizes: int) -> None:
    """Compile each block, for so many sizes of microbatches.

    DDP's own cuts through graphs are off: a block's gradients are a few MB, buckets wait for whole blocks anyway, and
    its first bucket of 1 MB cut the blocks in two.
    """
    model.compile_blocks()
    dynamo.optimize_ddp = False
    dynamo.recompile_limit = max(64, sizes * _KINDS)
    dynamo.accumulated_recompile_limit = max(256, 4 * dynamo.recompile_limit)
    # Else what does not fit runs uncompiled, at two thirds of the speed, with a line in a log that nobody reads.
    dynamo.fail_on_recompile_limit_hit = True


def microbatch_sizes(plan: PhasePlan, rows_of: Callable[[int, int], int], world_size: int) -> set[int]:
    """Tokens of the microbatches that a run's steps are cut into. rows_of: rows of a microbatch, by row length and rows
    of a rank."""
    sizes = set[int]()
    for phase in plan.phases:
        for segment in phase.segments:
            rows = segment.rows // world_size
            step = min(rows_of(phase.max_seq_len, rows), rows)
            sizes |= {step * phase.max_seq_len, rows % step * phase.max_seq_len}
    return sizes - {0}


@contextmanager
def eagerly() -> Iterator[None]:
    """Within, compiled modules run as they were written: batches of other sizes, as evaluations have, cost neither
    compilations nor the training's compiled code, and hooks on all modules are heard."""
    with torch.compiler.set_stance("force_eager"):
        yield


def or_say(forward: Callable[[], R]) -> R:
    """What the forward gives. When it cannot be compiled any more it runs uncompiled, and that is said."""
    try:
        return forward()
    except FailOnRecompileLimitHit as error:
        reason = (str(error).splitlines() or [""])[0]
        log.warning(
            "TRAINING FALLS BACK TO EAGER: the blocks were compiled %d times, and batches of this size are not, so the "
            "run goes on at two thirds of its speed or less (%s): report this, or set trainer.compile=false",
            dynamo.recompile_limit,
            reason,
        )
        dynamo.fail_on_recompile_limit_hit = False
        return forward()
