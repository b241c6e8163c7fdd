"""Masked tokens are restored."""

from data.feed.batches import Batch
from flexbert import FlexBertForMaskedLM
from flexbert_core.schema import Component
from recipe.phases import PhasePlan
from recipe.slots import OBJECTIVES
from training.objectives.base import Loss


@OBJECTIVES.register("mlm")
class MaskedTokens:
    """The model's loss of its masked tokens (BERT, arXiv 1810.04805, section 3.1); which they are says `masking`."""

    class Config(Component):
        pass

    def __init__(self, config: Config, *, plan: PhasePlan) -> None:
        pass

    def count(self, batch: Batch) -> int:
        return batch["masked"]

    def loss(self, model: FlexBertForMaskedLM, batch: Batch) -> Loss:
        total, count, scores = model.masked_loss(
            batch["input_ids"], batch["cu_seqlens"], batch["max_seqlen"], batch["labels"], num_masked=batch["masked"]
        )
        return Loss(total, count, scores)
