"""Section `one_rank`: DDP and FSDP2, compiled and not, over a group of one rank: NCCL's, on a GPU.

Composer wraps a model for several ranks only, so this wraps it as Composer does, with `training.parallelism` around.
"""

import socket
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ranks
from benchmarks.gpu_check.place import Line, Place, failed, told
from flexbert import FlexBertConfig, FlexBertForMaskedLM, build
from training.compiling import compile_blocks

# bfloat16 rounds by 0.4 %, and other kernels round otherwise. A lost microbatch or a wrong factor is 0.5 or more.
_ROUNDING = 0.1
LENGTHS = (200, 1, 63, 248)


def check(place: Place) -> Iterator[Line]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    backend = "nccl" if place.on_gpu else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        for name, call in collectives(place.device).items():
            yield _safe(f"one rank: {backend} {name}", lambda call=call: {"good": call()})
        expected = gradients(place, lambda model: model)
        for name, wrap in WRAPPED.items():
            for compiled in (False, True):
                if compiled and place.small:
                    continue  # a minute of a compiler for C++
                which = f"one rank: gradients of {name}{', compiled' if compiled else ''} are those of one process"
                yield _safe(which, lambda wrap=wrap, compiled=compiled: _compare(place, wrap, compiled, expected))
    finally:
        dist.destroy_process_group()


def collectives(device: str) -> dict[str, Callable[[], bool]]:
    """What `ranks` asks of a backend, where it does not leave out what one rank needs not do."""

    def reduced(operation: Any, dtype: torch.dtype) -> bool:
        values = torch.tensor([3, 4], dtype=dtype, device=device)
        dist.all_reduce(values, operation)
        return values.tolist() == [3, 4]

    def objects() -> bool:
        found: list[Any] = [None]
        dist.all_gather_object(found, {"step": 3})
        values: list[Any] = [{"step": 4}]
        dist.broadcast_object_list(values, 0)
        return found == [{"step": 3}] and values == [{"step": 4}]

    def waited() -> bool:
        dist.barrier()
        return True

    return {
        "sums float64": lambda: reduced(dist.ReduceOp.SUM, torch.float64),
        "sums int64": lambda: reduced(dist.ReduceOp.SUM, torch.int64),
        "takes a maximum of int32": lambda: reduced(dist.ReduceOp.MAX, torch.int32),
        "sends objects": objects,
        "waits": waited,
    }


def ddp(model: FlexBertForMaskedLM) -> nn.Module:
    """As Composer does."""
    return DistributedDataParallel(model)


def fsdp2(model: FlexBertForMaskedLM, gather: torch.dtype | None = None) -> nn.Module:
    """As Composer and training.parallelism do: each block a unit, the rest another."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {"mesh": init_device_mesh(next(model.parameters()).device.type, (1,))}
    of_blocks = dict(options)
    if gather is not None:
        of_blocks["mp_policy"] = MixedPrecisionPolicy(gather, torch.float32, cast_forward_inputs=False)
    for block in model.encoder.layers:
        fully_shard(block, **of_blocks)
    fully_shard(model, **options)
    if not ranks.averages():
        ranks.average_by_sums(model)
    return model


WRAPPED: dict[str, Callable[[FlexBertForMaskedLM], nn.Module]] = {"ddp": ddp, "fsdp2": fsdp2}
WRAPPED["fsdp2, gather bf16"] = lambda model: fsdp2(model, torch.bfloat16)


def gradients(
    place: Place, wrap: Callable[[FlexBertForMaskedLM], nn.Module], compiled: bool = False
) -> dict[str, Tensor]:
    """Of two microbatches, added up, by parameter; float32, whole."""
    model = build(small_model(), seed=0).to(place.device).train()
    if compiled:
        compile_blocks(model, 2)
    wrapped: Any = wrap(model)
    for number in range(2):
        last = number == 1
        if hasattr(wrapped, "set_requires_gradient_sync"):
            wrapped.set_requires_gradient_sync(last)
        batch = packed(place.device, number, model.config.vocab_size)
        with torch.autocast(place.device, torch.bfloat16):
            loss = wrapped(**batch).loss
        loss.backward()
    found: dict[str, Any] = {name: each.grad for name, each in model.named_parameters()}
    return {
        name: (each.full_tensor() if hasattr(each, "full_tensor") else each).float() for name, each in found.items()
    }


def small_model() -> FlexBertConfig:
    """Four layers, one of them global, heads of 64."""
    return FlexBertConfig.from_dict(
        {
            "vocab_size": 512,
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 384,
            "norm": "rmsnorm",  # the CPU's layer norm takes no bfloat16 weights
            "attention": {"name": "multihead", "global_attn_every_n_layers": 3, "window_per_side": 64},
        }
    )


def packed(device: str, seed: int, vocabulary: int) -> dict[str, Any]:
    """A batch of four documents, 30 % of the tokens masked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (sum(LENGTHS),), generator=generator)
    labels = torch.where(torch.rand(len(ids), generator=generator) < 0.3, ids, -100)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return {
        "input_ids": ids.to(device),
        "cu_seqlens": bounds.to(device),
        "max_seqlen": max(LENGTHS),
        "labels": labels.to(device),
        "num_masked": int((labels != -100).sum()),
    }


def _compare(place: Place, wrap: Any, compiled: bool, expected: dict[str, Tensor]) -> dict[str, Any]:
    found = gradients(place, wrap, compiled)
    off = max(float((found[name] - each).norm() / each.norm().clamp_min(1e-12)) for name, each in expected.items())
    return {"good": off <= _ROUNDING, "relative_error": round(off, 6)}


def _safe(name: str, call: Callable[[], dict[str, Any]]) -> Line:
    try:
        return told(name, **call())
    except Exception as error:
        return failed(name, error)
