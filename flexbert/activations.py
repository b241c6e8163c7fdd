"""Slot `activation`: elementwise functions, by the names of ModernBERT's pretraining code (src/bert_layers)."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexbert.registry import ACTIVATIONS


def _identity(states: Tensor) -> Tensor:
    return states


def _relu_squared(states: Tensor) -> Tensor:
    """Primer (arXiv 2109.08668)."""
    return F.relu(states).square()


_FUNCTIONS = {
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
}
for _name, _function in _FUNCTIONS.items():
    ACTIVATIONS.register(_name)(_function)
ACTIVATIONS.register("prelu")(nn.PReLU)
