"""Section `attention`: a kernel against the eager one, forward and backward; whether backward repeats its bits; times.

A kernel that ends in a CUDA error takes its process with it, so each kernel is a section of its own: `attention.flex`.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.place import Line, Place, failed, skipped, told
from flexbert.kernels import AttentionPlan, attend, choose_backend, is_deterministic, require_backend, set_deterministic
from flexbert_core.schema import ConfigError

KERNELS = ("torch_flash", "flash2", "flash3", "flex", "sdpa")
WINDOWS = ((-1, -1), (64, 64), (7, 7))
# One token, both sides of tiles and windows, one document that is long beside the others.
LENGTHS = (1, 63, 64, 65, 129, 200, 1, 500)
HEADS, DIM = 12, 64
_REPEATS = ("torch_flash", "flash2", "flash3")  # what the docs promise the bits of (training/determinism.py)


def check(place: Place, kernel: str) -> Iterator[Line]:
    """kernel: an attention.backend."""
    if place.on_gpu and kernel == KERNELS[0]:
        yield told("attention: auto", chosen=choose_backend("cuda", torch.bfloat16, head_dim=DIM))
    why, promised = _why_not(place, kernel), kernel in _REPEATS
    if why and promised:
        set_deterministic(False)  # a flash-attn 3 that does not repeat its bits runs only where that is not asked for
        promised = False
        if not _why_not(place, kernel):
            yield told(f"attention: {kernel} runs only with trainer.deterministic=false", why=why)
            why = ""
    if why:
        yield skipped(f"attention: {kernel}", why)
        return
    for window in WINDOWS:
        for kv_heads in (HEADS, HEADS // 3):
            name = f"attention: {kernel} is eager's, window {window[0]}, {kv_heads} key heads"
            try:
                off = disagreement(place, kernel, window, kv_heads)
                # bfloat16 rounds by 0.4 %.
                yield told(name, off <= 0.02, relative_error=round(off, 5))
            except Exception as error:
                yield failed(name, error)
    for window in WINDOWS[:2]:
        name = f"attention: {kernel} repeats its bits, window {window[0]}"
        try:
            same = repeats(place, kernel, window)
            yield told(name, same if promised else None, repeats=same)
        except Exception as error:
            yield failed(name, error)
    for case, lengths in cases(place).items():
        for window in WINDOWS[:2]:
            for deterministic in (True, False) if promised else (False,):
                name = f"attention: {kernel}, {case}, window {window[0]}, deterministic {deterministic}"
                if place.left < 5:
                    yield skipped(name, "no time left")
                    continue
                try:
                    yield told(name, **times(place, kernel, lengths, window, deterministic))
                except Exception as error:
                    yield failed(name, error)


def _why_not(place: Place, kernel: str) -> str:
    try:
        require_backend(kernel, place.device, torch.bfloat16, head_dim=DIM)  # pyright: ignore[reportArgumentType]
    except ConfigError as error:
        return str(error).removeprefix("attention.backend: ")
    return ""


def cases(place: Place) -> dict[str, list[int]]:
    """Documents of the batches that are timed."""
    if place.small:
        return {"4 x 32": [32] * 4}
    mixed = [8192, *[128] * 192]
    return {"32 x 1024": [1024] * 32, "4 x 8192": [8192] * 4, "one of 8192 among 192 of 128": mixed}


class Batch:
    """Queries, keys, values and a weight for the sum of the output, random numbers that bfloat16 holds exactly."""

    def __init__(self, place: Place, lengths: list[int], kv_heads: int = HEADS, heads: int = HEADS) -> None:
        generator = torch.Generator().manual_seed(0)
        total = sum(lengths)
        self.bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(place.device)
        self.longest, self.total = max(lengths), total
        shapes = [(total, heads, DIM), (total, kv_heads, DIM), (total, kv_heads, DIM), (total, heads, DIM)]
        self.tensors = [torch.randn(shape, generator=generator).bfloat16().to(place.device) for shape in shapes]

    def run(self, kernel: str, window: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        """Output and three gradients."""
        *inputs, weights = (each.to(dtype) for each in self.tensors)
        inputs = [each.requires_grad_() for each in inputs]
        plan = AttentionPlan(self.bounds, self.longest, self.total)
        out = attend(*inputs, plan, window_size=window, backend=kernel)  # pyright: ignore
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def disagreement(place: Place, kernel: str, window: tuple[int, int], kv_heads: int) -> float:
    """Largest relative error of output and gradients to eager in float32; infinite for what is not finite."""
    batch = Batch(place, list(LENGTHS[:5] if place.small else LENGTHS), kv_heads)
    ours, exact = batch.run(kernel, window), batch.run("eager", window, torch.float32)
    if not all(bool(each.isfinite().all()) for each in ours):
        return float("inf")
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True))


def repeats(place: Place, kernel: str, window: tuple[int, int], times: int = 5) -> bool:
    """Whether so many backwards of the same batch give the same bits. Most sums meet in a long document."""
    batch = Batch(place, [64, 9] if place.small else [4096, 64, 700])
    first: Any = None
    for _ in range(times):
        found = batch.run(kernel, window)
        first = first or found
        if not all(torch.equal(a, b) for a, b in zip(found, first, strict=True)):
            return False
    return True


def times(
    place: Place, kernel: str, lengths: list[int], window: tuple[int, int], deterministic: bool
) -> dict[str, Any]:
    """Milliseconds of forward with backward."""
    was = is_deterministic()
    set_deterministic(deterministic)
    try:
        batch = Batch(place, lengths)
        start = time.perf_counter()
        batch.run(kernel, window)
        place.settle()
        first = time.perf_counter() - start
        took = place.seconds(lambda: batch.run(kernel, window))
    finally:
        set_deterministic(was)
    return {"milliseconds": round(1e3 * took, 3), "first_seconds": round(first, 2)}
