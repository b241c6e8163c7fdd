"""What all ranks must decide alike: collectives, which give back their input to a process that is alone."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def on_any_rank(flag: bool | Tensor) -> bool:
    """True when the flag is set on one rank or more. flag: a tensor of one element costs one host sync, here."""
    if _alone():
        return bool(flag)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.as_tensor(flag, dtype=torch.int32, device=device).reshape(1)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found.item())


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, of plain Python types."""
    if _alone():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def of_all_ranks(value: Any) -> list[Any]:
    """Every rank's value, of plain Python types, in order of rank."""
    if _alone():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
