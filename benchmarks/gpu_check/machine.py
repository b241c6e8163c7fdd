"""Section `machine`: what is installed, and what the device reaches at best: speeds are told as shares of that."""

import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

from benchmarks.gpu_check.place import Line, Place, told
from flexbert.peaks import peak_flops

PACKAGES = ("torch", "triton", "numpy", "flash-attn", "flash-attn-3", "transformers", "tokenizers", "mosaicml")
PACKAGES += ("mosaicml-streaming", "torch-optimi", "omegaconf", "pydantic")
# A square product reaches 0.77 to 0.80 of the peak on an H100 and an H200 (docs/gpu.md). A device with
# less than half is throttled or shared, and no time means anything.
_LEAST_SHARE = 0.5


def check(place: Place) -> Iterator[Line]:
    yield told("versions", packages=versions())
    if place.on_gpu:
        yield told("device", facts=device())
    rate, memory_rate = gemm_rate(place), copy_rate(place)
    peak = peak_flops(torch.cuda.get_device_name()) if place.on_gpu else None
    share = None if peak is None else round(rate / peak, 3)
    good = None if share is None else share >= _LEAST_SHARE
    yield told("square product", good, tflops=round(rate / 1e12, 1), share_of_peak=share)
    yield told("copy", gigabytes_per_second=round(memory_rate / 1e9, 1))


def versions() -> dict[str, str | None]:
    """Of Python and packages; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda  # pyright: ignore[reportAttributeAccessIssue]
    return found


def device() -> dict[str, Any]:
    """Of the CUDA device."""
    properties = torch.cuda.get_device_properties(0)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "memory_mb": properties.total_memory >> 20,
        "multiprocessors": properties.multi_processor_count,
        "nccl": nccl,
        "free_mb": torch.cuda.mem_get_info()[0] >> 20,
    }


def gemm_rate(place: Place) -> float:
    """FLOP/s of a square bfloat16 product of random numbers."""
    size = 256 if place.small else 8192
    left, right = (torch.randn(size, size, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        torch.mm(left, right)
    return 2.0 * size**3 / place.seconds(lambda: torch.mm(left, right), repeats=8, inner=4)


def copy_rate(place: Place) -> float:
    """Bytes/s, read and written."""
    source = torch.empty(1 << (20 if place.small else 31), dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2.0 * source.numel() / place.seconds(lambda: target.copy_(source), inner=4)
