"""An objective from outside the project: beside masked tokens, every other token is named as well, with less weight.

imports: [every_token.py]
objective: {name: every_token, weight: 0.05}
"""

import torch
import torch.nn.functional as F
from pydantic import Field

from data.feed.batches import Batch
from flexbert import FlexBertForMaskedLM
from flexbert_core.schema import Component
from recipe.phases import PhasePlan
from recipe.slots import OBJECTIVES
from training.objectives import Loss


@OBJECTIVES.register("every_token")
class EveryToken:
    """Cross entropy of masked tokens, plus `weight` times that of all others (ELECTRA's all-tokens masked language
    modelling, arXiv 2003.10555, section 3.1, without its copy mechanism). The mean is over all tokens."""

    class Config(Component):
        weight: float = Field(0.05, ge=0, le=1, description="of a token that is not masked")

    def __init__(self, config: Config, *, plan: PhasePlan) -> None:
        self.config = config

    def count(self, batch: Batch) -> int:
        return batch["tokens"]

    def loss(self, model: FlexBertForMaskedLM, batch: Batch) -> Loss:
        tokens = batch["tokens"]
        labels = batch["labels"][:tokens]
        masked = labels != -100
        states = model.encoder(batch["input_ids"], batch["cu_seqlens"], batch["max_seqlen"])[:tokens]
        weight, bias = model.head.decoder(model.encoder.token_table)
        logits = F.linear(model.head(states), weight, bias)
        targets = torch.where(masked, labels, batch["input_ids"][:tokens])
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        return Loss((losses * torch.where(masked, 1.0, self.config.weight)).sum(), tokens)
