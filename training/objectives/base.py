"""What an objective gives."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

from data.feed.batches import Batch
from flexbert import FlexBertForMaskedLM
from flexbert.losses import TokenScores


class Loss(NamedTuple):
    """Of one microbatch on one rank. A step's loss is the sum of all sums over the sum of all counts, exactly, however
    the global batch is split."""

    sum: Tensor
    """Float32 scalar with gradients; without targets a 0 that still reaches every parameter, for which DDP waits."""
    count: int
    """What the sum is taken over: what `count` said of the batch."""
    scores: TokenScores | None = None
    """Of each masked token, in order, for the metrics of streams; None where the objective has none."""
    parts: Mapping[str, tuple[Tensor, int]] = {}
    """For the metrics: by name a sum, a scalar without gradients, and what it is a mean over, as the line has it."""


class Objective(Protocol):
    """What an entry offers; it is constructed with (config, plan=PhasePlan) and has no parameters of its own."""

    def count(self, batch: Batch) -> int:
        """Targets in a batch, known before the model runs, without waiting for the device."""
        ...

    def loss(self, model: FlexBertForMaskedLM, batch: Batch) -> Loss:
        """The loss of a microbatch. Under trainer.compile tokens that belong to nobody stand behind the first
        batch["tokens"] ones."""
        ...
