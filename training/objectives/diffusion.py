"""Masked tokens are restored at every rate: the encoder becomes a model of text (MDLM, arXiv 2406.07524)."""

from typing import ClassVar

import torch
from torch import Tensor

from data.feed.batches import Batch
from flexbert import FlexBertForMaskedLM
from flexbert.losses import TokenScores
from flexbert.registry import LOSSES
from flexbert_core.schema import Component
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from recipe.slots import OBJECTIVES
from training.objectives.base import Loss


@OBJECTIVES.register("diffusion")
class MaskedDiffusion:
    """Each row draws a rate t in (0, 1], and all its selected tokens become [MASK] (masking `diffusion`). The loss of a
    batch is

        1/N * sum over rows of 1/t * sum over the row's masked tokens of the model's loss,

    N the tokens that could have been masked, in all rows: all but special ones. It is MDLM's continuous-time objective
    (section 3) under the log-linear schedule, where a token is masked at time t with chance t; with plain cross entropy
    its mean is an upper bound on the negative log-likelihood, in nats a token. `main.py generate` samples from such a
    model.

    As in MDLM the model is not told t, and what is not masked is never changed. Departures: documents of a row share
    its rate and do not see each other; the softmax has [MASK] in it, which training drives to 0, and which the sampler
    leaves out, so the bound holds; for rates under 0.001 see the masking.
    """

    masking: ClassVar[str] = "diffusion"

    class Config(Component):
        pass

    @staticmethod
    def check(config: Config, run: RunConfig) -> None:
        """Raises ValueError for a loss of the model that cannot weigh tokens."""
        if not getattr(LOSSES.entries[run.model.loss.name], "takes_shares", False):
            raise ValueError(
                f"model.loss: {run.model.loss.name!r} does not say that it can weigh tokens: use cross_entropy, or "
                "take `shares` in it and give it `takes_shares = True`"
            )

    def __init__(self, config: Config, *, plan: PhasePlan) -> None:
        pass

    def count(self, batch: Batch) -> int:
        return sum(batch["selectable"])

    def loss(self, model: FlexBertForMaskedLM, batch: Batch) -> Loss:
        weight, bias = model.head.decoder(model.encoder.token_table)
        states, index, targets = model.masked_states(
            batch["input_ids"], batch["cu_seqlens"], batch["max_seqlen"], batch["labels"], num_masked=batch["masked"]
        )
        scores = TokenScores.empty(targets)
        total = model.loss(states, weight, bias, targets, scores, shares=shares(batch, index))
        return Loss(total, self.count(batch), scores)


def shares(batch: Batch, index: Tensor) -> Tensor:
    """1/t of the tokens at these places, (M,) int64: (M,) float32."""
    rows = torch.searchsorted(batch["row_bounds"], index, right=True, out_int32=True) - 1
    return batch["row_rates"].index_select(0, rows).reciprocal()
