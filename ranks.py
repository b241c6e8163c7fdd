"""Every collective of this project, one function each. A process that is alone gets back what it gave.

Collectives run on the device that the process group wants: CUDA under NCCL, which reduces nothing else.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

Operation = Literal["SUM", "MAX", "MIN"]
_LEFT = "flexbert/left"
_LOOK_SECONDS = 0.005, 0.5  # between looks into the store: at first, and at last
_TELL_SECONDS = 1.0
_LAST_SECONDS = 5.0
_STORE_GONE = (dist.DistError, RuntimeError)
_waits = itertools.count()


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


def wait_for_rank_0(work: Callable[[Callable[[], None]], None], got_on: Callable[[], None]) -> None:
    """Do `work` on rank 0 while the others wait: without a collective, whose time-out would end what goes on, slowly.
    All ranks call it.

    work: calls what it is given whenever it gets on. got_on: is called on every rank then, once a second at most on
    others than rank 0.
    """
    if _alone():
        work(got_on)
        return
    store, name = dist.distributed_c10d._get_default_store(), f"flexbert/wait-{next(_waits)}"
    if rank() != 0:
        seen = 0

        def look() -> None:
            nonlocal seen
            if (moves := store.add(f"{name}-moves", 0)) != seen:
                seen = moves
                got_on()

        _until_said(store, name, look)
        return
    told = 0.0

    def tell() -> None:
        nonlocal told
        got_on()
        if time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            store.add(f"{name}-moves", 1)

    try:
        work(tell)
    finally:
        store.set(name, "done")


@contextmanager
def until_rank_0_ends(leaves: Callable[[], bool]) -> Iterator[None]:
    """A block that the other ranks leave when rank 0 has left it, however long that takes: a launcher ends what still
    works when the other nodes of its job have ended. leaves: whether a rank leaves it all the same."""
    try:
        yield
    except BaseException:
        if rank() == 0 and not _alone():
            with contextlib.suppress(*_STORE_GONE):
                dist.distributed_c10d._get_default_store().set(_LEFT, "rank 0")
        raise
    if _alone():
        return
    store = dist.distributed_c10d._get_default_store()
    if rank() != 0:
        _until_said(store, _LEFT, leaves)
        with contextlib.suppress(*_STORE_GONE):
            store.add(f"{_LEFT}-others", 1)
        return
    with contextlib.suppress(*_STORE_GONE):
        store.set(_LEFT, "rank 0")
        end = time.monotonic() + _LAST_SECONDS  # the store may end with this process: others look into it first
        while store.add(f"{_LEFT}-others", 0) < dist.get_world_size() - 1 and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS[0])


def _until_said(store: Any, name: str, meanwhile: Callable[[], object]) -> None:
    """Wait until rank 0 has set a key, or `meanwhile` is true, or the store is gone. Then rank 0 or its launcher is, of
    which the next collective or the launcher has more to say."""
    pause, longest = _LOOK_SECONDS
    with contextlib.suppress(*_STORE_GONE):
        while not store.check([name]) and not meanwhile():
            time.sleep(pause)
            pause = min(2 * pause, longest)


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
