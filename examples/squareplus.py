"""Slot `activation`: (x + sqrt(x^2 + 4)) / 2, a relu without a corner (Barron 2021, arXiv 2112.11687)."""

import torch
from torch import Tensor

from flexbert import register


@register("activation", "squareplus")
def squareplus(states: Tensor) -> Tensor:
    """Any shape -> the same shape."""
    return (states + torch.sqrt(states.square() + 4.0)) / 2.0
