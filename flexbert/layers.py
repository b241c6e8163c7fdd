"""Small parts that several components share."""

from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from flexbert.registry import NORMS
from schema import Component

Activation = Literal["gelu", "silu"]

# gelu is the exact erf form in every BERT-family reference, never the tanh approximation.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}


class OutputProjection(nn.Linear):
    """A linear layer whose output is added to the residual stream. Inits that scale with depth look for this class."""


def dropout(hidden_states: Tensor, probability: float, training: bool) -> Tensor:
    """Dropout that costs nothing when it is off."""
    return F.dropout(hidden_states, probability) if training and probability > 0 else hidden_states


def build_norm(config: Component, hidden_size: int) -> Any:
    """A module from the norm slot."""
    return NORMS.build(config, hidden_size=hidden_size)
