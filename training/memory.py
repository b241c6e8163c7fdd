"""What is said where a device runs out of memory."""

import torch

from flexbert_core.schema import RunError
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from training.microbatches import Microbatches


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had no room; some of its libraries say so in words alone."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def out_of_memory(
    error: RuntimeError, config: RunConfig, world_size: int, done: int, microbatches: Microbatches | None
) -> RunError | None:
    """What to say when a run's model, steps or evaluations have no room. done: steps. microbatches: as the run cuts
    them; None: it did not come to that."""
    if not is_out_of_memory(error):
        return None
    plan = PhasePlan(config)
    step = min(done, plan.total_steps - 1)
    length, tokens = plan.at(step).max_seq_len, plan.tokens_before(step + 1) - plan.tokens_before(step)
    rows = (microbatches or Microbatches(config.trainer)).rows(length, tokens // length // world_size)
    options, fixes = config.trainer, list[str]()
    if rows > 1:
        by_rows = options.microbatch_size is not None
        less = f"microbatch_size={rows // 2}" if by_rows else f"microbatch_tokens={rows // 2 * length}"
        fixes.append(f"trainer.{less}")
        if options.microbatch_size != "auto" and options.parallelism.name == "ddp":
            fixes.append("trainer.microbatch_size=auto")
    if options.activation_checkpointing != 1:
        fixes.append("trainer.activation_checkpointing=1")
    fixes.append("shorter rows, or a smaller model")
    return RunError(
        f"{config.folder}: out of memory after {done:,} steps, in microbatches of {rows} rows of {length} slots: set "
        f"{', or '.join(fixes)}; the same command then goes on from the newest checkpoint"
    )
