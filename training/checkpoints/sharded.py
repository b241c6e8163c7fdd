"""Tensors of which each rank holds a part (FSDP2): whole on the way into a file, cut again on the way back.

Files hold whole tensors under their own names, so any number of ranks, sharded or not, reads what any other wrote.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from flexbert import FlexBertForMaskedLM, build
from flexbert.config import without_init
from flexbert.growing import Grow
from training.objectives.phases import PARTS


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold parts of the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Let go of parameters that a forward without backward (evaluation) has left gathered: `parameters()` would give
    those, which no optimizer knows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on its device; a plain one as it is. Of a sharded one: a collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(tensor: Tensor, target: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank holds whole, cut as `target` is; whole if that is. Not a collective.

    Shapes must be equal.
    """
    if not isinstance(target, DTensor):
        return tensor
    # No source rank: each cuts its own copy, nothing is sent.
    whole_here = tensor.to(target.device, target.dtype)
    return distribute_tensor(whole_here, target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy whole weights, by name, into a model, sharded or not; of tied ones a single name is enough.

    Raises RuntimeError when a name is unknown or missing, or a shape differs.
    """
    targets = unshared(model)
    if targets.keys() != weights.keys():
        raise RuntimeError(f"parameters differ: {sorted(targets.keys() ^ weights.keys())}")
    for name, target in targets.items():
        if target.shape != weights[name].shape:
            raise RuntimeError(f"{name} is {tuple(weights[name].shape)}, here {tuple(target.shape)}")
        target.copy_(cut_like(weights[name], target))


def unshared(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, of tensors with several names (a tied decoder) the first one only."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor
    return kept


def whole_model(model: FlexBertForMaskedLM, wanted: bool) -> FlexBertForMaskedLM | None:
    """The model as one process holds it: itself, or, if it is sharded, a copy in host memory, without what objectives
    train beside it. None unless wanted.

    Of a sharded model a collective, tensor by tensor: no rank that does not want it holds more than one.
    """
    if not is_sharded(model):
        return model if wanted else None
    weights = {}
    for name, part in unshared(model).items():
        gathered = whole(part)
        if wanted and not name.startswith(PARTS):
            weights[name] = gathered.cpu()
    if not wanted:
        return None
    grows = isinstance(model.config.init, Grow.Config)  # its source is not needed again
    copy = build(without_init(model.config) if grows else model.config)
    load_weights(copy, weights)
    return copy.train(model.training)
