"""A rank's batch, cut into microbatches: how many rows each has, and what the device needs of them."""

import torch

from data.feed.batches import Batch
from recipe.sections import TrainerConfig
from training.static_shapes import fill_slots

# What the device reads. Pinned, the host queues their copies and goes on, and never waits for one.
_PINNED = ("input_ids", "labels", "cu_seqlens", "row_bounds", "masked_streams", "row_rates")


class Microbatches:
    """Cuts batches by rows. Everything is done on the host, before the device sees a tensor of them."""

    def __init__(self, options: TrainerConfig, pins: bool = False) -> None:
        """pins: whether there is a device that copies from pinned memory."""
        self.options, self._pins = options, pins
        self.found = dict[int, int]()
        """Rows that fit, by row length: what `auto` is to take (training/fitting.py)."""

    def rows(self, row_length: int, rows_of_rank: int) -> int:
        """Rows of a microbatch, 1 to rows_of_rank, of rows of so many slots. The same on every rank."""
        rows: int | str | None = self.options.microbatch_size
        if self.options.microbatch_tokens is not None:
            rows = max(1, self.options.microbatch_tokens // row_length)
        elif rows == "auto":
            rows = self.found.get(row_length)
        return min(rows_of_rank if rows is None else int(rows), rows_of_rank)

    def __call__(self, batch: Batch, _rows: int | float = 0) -> list[Batch]:
        """The microbatches. _rows: what Composer would take, which knows no row length."""
        rows_of_rank = len(batch["sequences"])
        row_length = batch["slots"] // max(rows_of_rank, 1)
        parts = split_batch(batch, self.rows(row_length, rows_of_rank) if rows_of_rank else 1)
        if self.options.compile:
            parts = [fill_slots(part) for part in parts]
        if self._pins:
            parts = [{**part, **{name: part[name].pin_memory() for name in _PINNED if name in part}} for part in parts]
        return [{**part, "is_last": number == len(parts)} for number, part in enumerate(parts, 1)]


def split_batch(batch: Batch, step: int) -> list[Batch]:
    """Cut a batch into microbatches of at most `step` rows. Masking is final before, and dropout keyed by row, so
    nothing else changes."""
    sequences = batch["sequences"]
    if len(sequences) <= step:
        return [batch]
    parts = []
    ends = torch.cumsum(torch.tensor([0, *sequences]), 0).tolist()
    slots_per_row = batch["slots"] // len(sequences)
    bounds, first_masked = batch["cu_seqlens"].cpu(), 0
    row_bounds = batch["row_bounds"].tolist()
    for first in range(0, len(sequences), step):
        last = min(first + step, len(sequences))
        begin, end = row_bounds[first], row_bounds[last]
        cu_seqlens = batch["cu_seqlens"][ends[first] : ends[last] + 1] - begin
        labels = batch["labels"][begin:end]
        last_masked = first_masked + int((labels != -100).sum())
        rates = {name: batch[name][first:last] for name in ("row_rates", "selectable") if name in batch}
        parts.append(
            {
                **batch,
                **rates,
                "input_ids": batch["input_ids"][begin:end],
                "labels": labels,
                "cu_seqlens": cu_seqlens,
                "max_seqlen": int(bounds[ends[first] : ends[last] + 1].diff().max()),
                "sequences": sequences[first:last],
                "row_bounds": batch["row_bounds"][first : last + 1] - begin,
                "first_row": batch["first_row"] + first,
                "slots": (last - first) * slots_per_row,
                "masked": last_masked - first_masked,
                "tokens": end - begin,
                "masked_streams": batch["masked_streams"][first_masked:last_masked],
            }
        )
        first_masked = last_masked
    return parts
