"""The moving average of the weights that a checkpoint holds."""

from torch import nn

from callbacks.ema import WeightAverage
from training.checkpoints.files import Checkpoint
from training.checkpoints.sharded import cut_like


def restore_average(checkpoint: Checkpoint, model: nn.Module, ema: WeightAverage) -> bool:
    """Go on with a checkpoint's average, cut as the model's parameters are. False, and nothing done, when it is of a
    run without one."""
    state = checkpoint.state.get("ema")
    if state is None:
        return False
    parameters = dict(model.named_parameters())
    ema.load_state_dict(state, {name: cut_like(whole, parameters[name]) for name, whole in checkpoint.ema.items()})
    return True
