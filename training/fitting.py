"""How many rows fit into memory at a time: tried before anything is wrapped for several ranks, and agreed on."""

import logging
from collections.abc import Callable

import torch

import ranks
from data.feed.batches import Batch
from data.feed.masking import IGNORE
from flexbert_core.schema import ConfigError
from recipe.phases import Phase, PhasePlan
from training.compiling import eagerly
from training.composer_model import PretrainingModel
from training.memory import is_out_of_memory

log = logging.getLogger(__name__)

_BUCKETS = 4  # bytes of a parameter in those of DDP, which come with the first steps, as the optimizer's state does
# What is left free: fragments, NCCL's buffers, and batches with more documents than those tried.
_SPARE = 0.05


def fitting_rows(plan: PhasePlan, model: PretrainingModel, world_size: int, states: int = 0) -> dict[int, int]:
    """Rows of a microbatch by row length, the same on every rank: of all rows of a rank, halved as often as a rank ran
    out of memory, in whatever phase of that length. Each try is a forward and backward of random documents, one to a
    row. A collective.

    states: bytes that a rank will hold beside its weights (training/states.py), for which room is left.
    Raises ConfigError where not even one row fits. Gradients are gone afterwards; nothing else has changed.
    """
    of_rank = [max(segment.rows for segment in phase.segments) // world_size for phase in plan.phases]
    found = dict[int, int]()
    for phase, rows in zip(plan.phases, of_rank, strict=True):
        found[phase.max_seq_len] = max(rows, found.get(phase.max_seq_len, 1))
    for number, phase in enumerate(plan.phases):
        length = phase.max_seq_len
        tries = [min(of_rank[number], found[length])]
        while tries[-1] > 1:
            tries.append(-(-tries[-1] // 2))
        fits = largest(tries, lambda rows, number=number, phase=phase: _try(model, number, phase, rows, states))
        if fits is None:
            raise ConfigError(
                f"trainer.microbatch_size: auto: not one row of {length} slots fits in memory: set "
                "trainer.activation_checkpointing=1, shorten the rows, or take a smaller model"
            )
        if fits < tries[0]:
            found[length] = fits
    return found


def largest(sizes: list[int], run: Callable[[int], None]) -> int | None:
    """The first of these sizes, which fall, at which `run` has memory enough on all ranks; None: at none. A rank that
    runs out does so alone, between collectives. A collective."""
    for size in sizes:
        failed = False
        try:
            run(size)
        except RuntimeError as error:
            failed = is_out_of_memory(error)
            if not failed:
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not ranks.on_any_rank(failed):
            return size
        log.info("microbatches of %d rows do not fit", size)
    return None


def _try(model: PretrainingModel, number: int, phase: Phase, rows: int, states: int) -> None:
    """A forward and backward, beside what later steps will hold."""
    device = next(model.parameters()).device
    held = []
    try:
        if device.type == "cuda":
            wanted = states + _BUCKETS * sum(parameter.numel() for parameter in model.parameters())
            wanted += int(_SPARE * torch.cuda.get_device_properties(device).total_memory)
            held.append(torch.empty(wanted, dtype=torch.uint8, device=device))
        batch = _batch(model, number, phase, rows, device)
        with eagerly():
            model.loss(model(batch), batch).backward()
    finally:
        held.clear()
        model.zero_grad(set_to_none=True)


def _batch(model: PretrainingModel, number: int, phase: Phase, rows: int, device: torch.device) -> Batch:
    length = phase.max_seq_len
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.model.config.vocab_size, (rows * length,), generator=generator)
    chosen = torch.rand(len(ids), generator=generator) < phase.masking.highest_rate
    bounds = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    masked = int(chosen.sum())
    return {
        "input_ids": ids.to(device),
        "labels": torch.where(chosen, ids, IGNORE).to(device),
        "cu_seqlens": bounds.to(device),
        "max_seqlen": length,
        "sequences": [1] * rows,
        "row_bounds": bounds.to(device),
        "first_row": 0,
        "phase": number,
        "masking_rate": phase.masking.highest_rate,
        "row_rates": torch.full((rows,), phase.masking.highest_rate, device=device),
        "selectable": [length] * rows,
        "slots": rows * length,
        "tokens": rows * length,
        "masked": masked,
        "masked_streams": torch.zeros(masked, dtype=torch.int16, device=device),
        "is_last": True,
    }
