"""Bytes of what a run keeps beside its weights: the optimizer's state, and the average of `ema`."""

from torch import nn

from recipe.config import RunConfig
from recipe.slots import OPTIMIZERS

NUMBER = 4
"""Bytes of one: weights, states and averages are float32, whatever the steps are computed in."""
_MOMENTS = 2  # of a weight, in the optimizer's state; muon has one for matrices and takes less


def state_bytes(config: RunConfig, model: nn.Module) -> int:
    """Of the optimizer's state and of the average, on a rank that keeps them whole, and in a checkpoint. model: with
    all that the run trains."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters * NUMBER * (_MOMENTS + (config.ema is not None)) + more_states(config, model)


def more_states(config: RunConfig, model: nn.Module) -> int:
    """Bytes of the optimizer's state besides two moments of each parameter."""
    more = getattr(OPTIMIZERS.entries[config.optimizer.name], "more_states", None)
    return 0 if more is None else more(model) * NUMBER
