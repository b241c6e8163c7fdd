"""The entries of the slot `activation`, by the names of ModernBERT's pretraining code (src/bert_layers).

A new one is one line in this table: flexbert/registry.py registers all of it, and exports with code of their own carry
this file. So it imports nothing but torch. Licence: Apache-2.0.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _identity(states: Tensor) -> Tensor:
    return states


def _relu_squared(states: Tensor) -> Tensor:
    """Primer (arXiv 2109.08668)."""
    return F.relu(states).square()


# A function of a tensor, or a module class that is constructed without arguments.
FUNCTIONS: dict[str, Any] = {
    # The exact erf form in every BERT-family reference; gelu_tanh is its approximation.
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu_squared": _relu_squared,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "identity": _identity,
    "celu": F.celu,
    "elu": F.elu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "logsigmoid": F.logsigmoid,
    "mish": F.mish,
    "relu6": F.relu6,
    "selu": F.selu,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "prelu": nn.PReLU,
}
