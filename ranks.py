"""Every collective of this project, one function each. A process that is alone gets back what it gave.

Collectives run on the device that the process group wants: CUDA under NCCL, which reduces nothing else.
"""

import os
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Operation = Literal["SUM", "MAX", "MIN"]


def rank() -> int:
    """This process's number among all; as its launcher says while there is no process group yet."""
    return dist.get_rank() if _initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes of the run; as their launcher says while there is no process group yet."""
    return dist.get_world_size() if _initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def barrier() -> None:
    """Wait for all ranks."""
    if not _alone():
        dist.barrier()


def over_ranks(values: Tensor, operation: Operation = "SUM") -> Tensor:
    """A tensor reduced over all ranks, on the CPU. What was given stays as it is."""
    if _alone():
        return values.cpu()
    reduced = values.to(_device(), copy=True)
    dist.all_reduce(reduced, getattr(dist.ReduceOp, operation))
    return reduced.cpu()


def add_up(values: Tensor) -> None:
    """Sum a tensor over all ranks in its place, on its device."""
    if not _alone():
        dist.all_reduce(values)


def on_any_rank(flag: bool | Tensor) -> bool:
    """True when the flag is set on one rank or more. flag: a tensor of one element costs one host sync, here."""
    if _alone():
        return bool(flag)
    found = torch.as_tensor(flag, dtype=torch.int32, device=_device()).reshape(1)
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


def average_of_ones(device: torch.device) -> float:
    """What the backend makes of ones when asked to scatter their average, as fully_shard does with gradients: 1, but
    the number of ranks in the gloo of torch 2.7, which sums without a word."""
    if not _initialized():
        return 1.0
    ones = torch.ones(dist.get_world_size(), device=device)
    average = torch.empty(1, device=device)
    dist.reduce_scatter_tensor(average, ones, dist.ReduceOp.AVG)
    return average.item()


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _alone() -> bool:
    return not _initialized() or dist.get_world_size() == 1


def _device() -> str:
    return "cuda" if "nccl" in dist.get_backend() else "cpu"
