"""Rows per step of a phase: always the same, or growing over the phase's first tokens.

ModernBERT (arXiv 2412.13663, sec. 2.2.2 and app. A) gives each batch size the same number of update steps, on an uneven
token schedule: rows grow linearly in steps, not in tokens. A size b gets the share b / (sum of all sizes) of the
warmup's tokens, so at t of T tokens there are about sqrt(b0^2 + (b1^2 - b0^2) t / T) rows. The arithmetic is that of
its code (src/sequence_packer.py, BatchSizeWarmupScheduler) with two departures: sizes are `step` rows apart, where it
has one row per rank, because every size must be a multiple of the lanes; and slots are counted, where it counts tokens
without padding (packed, they differ by about a percent).
"""

from collections.abc import Iterator

from pydantic import Field

from flexbert_core.schema import Count, Schema


class BatchSizeWarmup(Schema):
    """Fewer rows per step at the phase's start, each size for the same number of steps; then global_batch_size."""

    start: int = Field(alias="from", ge=1, description="rows per step of the phase's first steps")
    tokens: Count = Field(gt=0, description="tokens until global_batch_size is reached")
    step: int | None = Field(
        default=None, ge=1, description="rows from one size to the next; a multiple of the ranks; default: the lanes"
    )


def runs_of_steps(
    warmup: BatchSizeWarmup | None, step: int, target: int, max_seq_len: int, tokens: int
) -> Iterator[tuple[int, int]]:
    """(rows, steps) of a phase in order: together at least `tokens` slots, and less than one step more.

    The size of a step is a function of the slots before it in the phase: with sizes b[0] < ... < b[n - 1] < target,
    `step` apart, it is the first b[i] for which they are fewer than warmup.tokens * (b[0] + ... + b[i]) / sum(b), else
    target. Whole numbers throughout; O(n), however many steps there are.
    """
    done = 0
    if warmup is not None:
        sizes = range(warmup.start, target, step)
        total, share = sum(sizes), 0
        for rows in sizes:
            share += rows
            missing = warmup.tokens * share - done * total
            steps = -(-missing // (total * rows * max_seq_len))
            if steps > 0:
                yield rows, steps
                done += steps * rows * max_seq_len
    if done < tokens:
        yield target, -(-(tokens - done) // (target * max_seq_len))
