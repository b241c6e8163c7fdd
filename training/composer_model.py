"""The encoder as Composer sees it."""

from collections.abc import Callable, Sequence
from typing import Any

from composer.models import ComposerModel
from torch import Tensor

from data.feed.batches import Batch
from flexbert import FlexBertForMaskedLM
from flexbert.dropout import TokenKeys, keyed_dropout
from flexbert_core.schema import RunError
from training.compiling import or_say
from training.objectives import Loss, Objective
from training.objectives.phases import idle_parameters
from training.parallelism import Parallelism


class PretrainingModel(ComposerModel):
    """The encoder as Composer sees it: one child, fed with the loader's batches."""

    def __init__(
        self,
        model: FlexBertForMaskedLM,
        objectives: Sequence[Objective],
        parallelism: Parallelism,
        autocast: Callable[[], Any],
        dropout_seed: Callable[[], int],
    ) -> None:
        """objectives: of each phase. autocast: a context for the forward. Composer refuses its own on the CPU; so both
        devices run the same. dropout_seed: 63 bits, of the step under way, the same on all ranks."""
        super().__init__()
        self.model, self.objectives = model, objectives
        self.dropout_seed = dropout_seed
        self.parallelism, self.autocast = parallelism, autocast

    def forward(self, batch: Batch) -> Loss:
        return or_say(lambda: self._loss(batch))

    def _loss(self, batch: Batch) -> Loss:
        self.parallelism.begin(batch.get("is_last", True))
        tokens = len(batch["input_ids"])
        keys = TokenKeys(self.dropout_seed(), batch["first_row"], batch["row_bounds"], tokens)
        with self.autocast(), keyed_dropout(keys):
            objective = self._objective(batch)
            loss = self.model.within(lambda model: objective.loss(model, batch))
        # DDP waits for every gradient, of what other phases train, too.
        for parameter in idle_parameters(self.model, objective):
            loss = loss._replace(sum=loss.sum + 0 * parameter.flatten()[0])
        return loss

    def loss(self, outputs: Loss, batch: Batch) -> Tensor:
        """Mean over the microbatch's targets; Composer weighs it by their count, so the step's loss and gradient are
        exactly the mean over the global batch, however it is split. Raises RunError for another count than was said."""
        expected = self._count(batch)
        if outputs.count != expected:
            raise RunError(f"objective: its loss is over {outputs.count} targets, its count says {expected}")
        return outputs.sum / max(outputs.count, 1)

    def count_tokens(self, batch: Batch) -> dict[str, int]:
        """Composer's two counts of a batch.

        It divides by the global sum of the second, which may be 0 targets. So a batch counts for a 2^32th of a target
        besides: then weights are off by less than 1e-9, float32 rounds at 6e-8, and a sum of zeros is divided by
        something.
        """
        return {"total": len(batch["input_ids"]), "loss_generating": self._count(batch) * 2**32 + 1}

    def _objective(self, batch: Batch) -> Objective:
        return self.objectives[batch["phase"]]

    def _count(self, batch: Batch) -> int:
        """Raises RunError for what is no plain number of targets: a tensor of int32 would overflow without a word."""
        count = self._objective(batch).count(batch)
        if type(count) is not int or count < 0:
            raise RunError(f"objective: count() gives {count!r}: give a plain int, 0 or more")
        return count


class Microbatch(dict[str, Any]):
    """Composer copies each one deeply, for metrics of its own, of which there are none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Microbatch":
        return self
