"""Every collective of this project, one function each. A process that is alone gets back what it gave.

Collectives run on the device that the process group wants: CUDA under NCCL, which reduces nothing else.
"""

import os
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

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


def add_up(values: Tensor, mesh: DeviceMesh) -> None:
    """Sum a tensor in its place, on its device, over the ranks that share one copy of the model. mesh: that of its
    parameters, whose last dimension shares; others are copies, which have the same sum (see `mesh`)."""
    if not _alone():
        dist.all_reduce(values, group=mesh.get_group(mesh.ndim - 1))


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


def shared_out(items: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """work(items), to which each rank does its share; on every rank. A collective.

    items: (count, ...), the same on all ranks. work: gives as many of the same shape, each of its own item alone.
    """
    count = len(items)
    if _alone() or count < 2:
        return work(items)
    share = -(-count // world_size())
    mine = items[rank() * share : (rank() + 1) * share]
    done = items.new_zeros(share, *items.shape[1:])
    if len(mine):
        done[: len(mine)] = work(mine)
    parts = items.new_empty(share * world_size(), *items.shape[1:])
    dist.all_gather_into_tensor(parts, done)
    return parts[:count]


def mesh(replicate: int, device: str) -> DeviceMesh:
    """The ranks as (copies of the model, ranks that share one): neighbours share. A collective."""
    return init_device_mesh(device, (replicate, world_size() // replicate), mesh_dim_names=("replicate", "shard"))


def averages() -> bool:
    """Whether the backend takes means, as fully_shard asks it to: NCCL does. The gloo of torch 2.7 scatters sums in
    their place without a word, and refuses to reduce to one."""
    return not _initialized() or "nccl" in dist.get_backend()


def average_by_sums(model: nn.Module) -> None:
    """Make fully_shard add gradients up and divide, on a backend that takes no means. model: as fully_shard left it."""
    if hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):  # torch 2.8 and later
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # pyright: ignore
        return
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives

    def factors(scattered: Any, reduced: Any, *_: Any) -> tuple[float, float]:
        """What is divided by before and after the sum; a factor that is there makes it one."""
        return 1.0, float(scattered.size() * (1 if reduced is None else reduced.size()))

    _fsdp_collectives._get_gradient_divide_factors = factors


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _alone() -> bool:
    return not _initialized() or dist.get_world_size() == 1


def _device() -> str:
    """Where the group takes tensors from: NCCL's has no backend for the CPU."""
    return "cpu" if "cpu:" in dist.get_backend_config() else "cuda"
