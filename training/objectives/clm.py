"""Each token is told from those before it."""

from typing import ClassVar

from data.feed.batches import Batch
from flexbert import FlexBertForMaskedLM
from flexbert.encoder import require_causal
from flexbert_core.schema import Component, ConfigError
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from recipe.slots import OBJECTIVES
from training.objectives.base import Loss


@OBJECTIVES.register("clm")
class NextTokens:
    """The model's loss of the token behind each, with causal attention inside each document (GPT, Radford et al. 2018,
    eq. 1). The weights are those that a phase of `mlm` goes on with: no parameter knows on which side it may look.

    Local layers see their window's left side. The head, loss and packing are those of `mlm`.
    """

    masking: ClassVar[str] = "next"

    class Config(Component):
        pass

    @staticmethod
    def check(config: Config, run: RunConfig) -> None:
        try:
            require_causal(run.model)
        except ConfigError as error:
            raise ValueError(str(error)) from None

    def __init__(self, config: Config, *, plan: PhasePlan) -> None:
        pass

    def count(self, batch: Batch) -> int:
        return batch["masked"]

    def loss(self, model: FlexBertForMaskedLM, batch: Batch) -> Loss:
        total, count, scores = model.masked_loss(
            batch["input_ids"],
            batch["cu_seqlens"],
            batch["max_seqlen"],
            batch["labels"],
            num_masked=batch["masked"],
            causal=True,
        )
        return Loss(total, count, scores)
