"""Slot `loss`: tokens that the model knows already count less (focal loss, Lin et al. 2017, arXiv 1708.02002)."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from flexbert import register
from flexbert.losses import TokenScores
from flexbert_core.schema import Component


@register("loss", "focal")
class FocalLoss:
    """Sum over masked tokens of (1 - p)^gamma * -log p, where p is what the model gives the target."""

    class Config(Component):
        gamma: float = Field(2.0, ge=0, description="0: cross entropy (the paper: 2)")

    def __init__(self, config: Config) -> None:
        self.gamma = config.gamma

    def __call__(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scores: TokenScores | None = None,
    ) -> Tensor:
        """hidden_states (M, D), weight (V, D), bias (V,), targets (M,) -> the sum, a float32 scalar; 0 for no tokens.

        The caller divides by the masked tokens of the global batch, so a loss must be a sum. All logits are held at
        once here; `flexbert/losses.py` shows how a large vocabulary goes in pieces.
        """
        logits = F.linear(hidden_states, weight, bias).float()
        losses = F.cross_entropy(logits, targets, reduction="none")
        if scores is not None:  # for the metrics: the plain loss of each token, and whether it was the best guess
            scores.losses.copy_(losses.detach())
            best = logits.detach().amax(1)
            scores.hits.copy_(logits.detach().gather(1, targets[:, None])[:, 0] >= best)
        return (losses * (1.0 - torch.exp(-losses)).pow(self.gamma)).sum()
