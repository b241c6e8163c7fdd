"""The encoder and its batches as Composer sees them."""

from collections.abc import Callable
from typing import Any

import torch
from composer.models import ComposerModel
from torch import Tensor

from data.feed.batches import Batch
from flexbert import FlexBertForMaskedLM
from flexbert.dropout import TokenKeys, keyed_dropout
from flexbert_core.schema import RunError
from training.objectives import Loss, Objective
from training.parallelism import Parallelism
from training.static_shapes import fill_slots


class PretrainingModel(ComposerModel):
    """The encoder as Composer sees it: one child, fed with the loader's batches."""

    def __init__(
        self,
        model: FlexBertForMaskedLM,
        objective: Objective,
        parallelism: Parallelism,
        autocast: Callable[[], Any],
        static_shapes: bool,
        dropout_seed: Callable[[], int],
    ) -> None:
        """autocast: a context for the forward. Composer refuses its own on the CPU; so both devices run the same.
        dropout_seed: 63 bits, of the step under way, the same on all ranks."""
        super().__init__()
        self.model, self.objective = model, objective
        self.static_shapes, self.dropout_seed = static_shapes, dropout_seed
        self.parallelism, self.autocast = parallelism, autocast

    def forward(self, batch: Batch) -> Loss:
        if self.static_shapes and self.training:
            batch = fill_slots(batch)
        tokens = len(batch["input_ids"])
        keys = TokenKeys(self.dropout_seed(), batch["first_row"], batch["row_bounds"], tokens)
        with self.autocast(), keyed_dropout(keys):
            return self.model.within(lambda model: self.objective.loss(model, batch))

    def loss(self, outputs: Loss, batch: Batch) -> Tensor:
        """Mean over the microbatch's targets; Composer weighs it by their count, so the step's loss and gradient are
        exactly the mean over the global batch, however it is split. Raises RunError for another count than was said."""
        expected = self._count(batch)
        if outputs.count != expected:
            raise RunError(f"objective: its loss is over {outputs.count} targets, its count says {expected}")
        return self.parallelism.correct(outputs.sum / max(outputs.count, 1))

    def count_tokens(self, batch: Batch) -> dict[str, int]:
        """Composer's two counts of a batch.

        It divides by the global sum of the second, which may be 0 targets. So a batch counts for a 2^32th of a target
        besides: then weights are off by less than 1e-9, float32 rounds at 6e-8, and a sum of zeros is divided by
        something.
        """
        return {"total": len(batch["input_ids"]), "loss_generating": self._count(batch) * 2**32 + 1}

    def _count(self, batch: Batch) -> int:
        """Raises RunError for what is no plain number of targets: a tensor of int32 would overflow without a word."""
        count = self.objective.count(batch)
        if type(count) is not int or count < 0:
            raise RunError(f"objective: count() gives {count!r}: give a plain int, 0 or more")
        return count


class Microbatch(dict[str, Any]):
    """Composer copies each one deeply, for metrics of its own, of which there are none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Microbatch":
        return self


def split_batch(batch: Batch, rows: int | float) -> list[Batch]:
    """Cut a batch into microbatches of at most `rows` rows. Masking is final before, and dropout
    keyed by row, so nothing else changes."""
    step, sequences = int(rows), batch["sequences"]
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
        parts.append(
            {
                **batch,
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
