"""The CUDA kernels against the eager reference, forward and backward, on the device itself.

Every test here is skipped without one, with the reason; what the kernels are called with is tested in test_gpu_calls.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from flexbert.kernels import AttentionPlan, attend, require_backend
from flexbert_core.schema import ConfigError
from tests.flexbert.kernels.cases import SLOPES, qkv_of
from tests.helpers.models import ODD_LENGTHS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the kernels run nowhere else"),
]

LENGTHS = [ODD_LENGTHS, (1,), (0, 5, 0, 0, 300, 0), (1,) * 5, (500, 20, 480, 1, 31, 370), (2048,), (), (0, 0)]


def outputs(
    backend: Any,
    dtype: torch.dtype,
    lengths: tuple[int, ...],
    window: tuple[int, int],
    slopes: Tensor | None,
    kv_heads: int,
    dim: int,
) -> list[Tensor]:
    """Output and gradients of queries, keys and values, from the same bfloat16 numbers in any dtype."""
    queries, keys, values = (t.detach().bfloat16().to("cuda", dtype) for t in qkv_of(sum(lengths), dim=dim))
    tensors = [t.requires_grad_() for t in (queries, keys[:, :kv_heads], values[:, :kv_heads])]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    plan = AttentionPlan(bounds, max(lengths, default=0), sum(lengths))
    slopes = None if slopes is None else slopes.cuda()
    out = attend(*tensors, plan, window_size=window, alibi_slopes=slopes, backend=backend)  # pyright: ignore
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out)
    return [out, *torch.autograd.grad((out * weights).sum(), tensors)]


def runs_here(backend: Any, dtype: torch.dtype, slopes: Tensor | None, dim: int) -> None:
    """Skip the test, with the reason, where the kernel cannot run."""
    try:
        require_backend(backend, "cuda", dtype, alibi=slopes is not None, head_dim=dim)
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["plain", "alibi"])
@pytest.mark.parametrize("window", [(-1, -1), (1, 1), (7, 7), (64, 64), (100, 100)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("backend", ["flash2", "flash3", "flex"])
def test_kernels_agree_with_eager(
    backend: str, lengths: tuple[int, ...], window: tuple[int, int], slopes: Tensor | None, kv_heads: int
) -> None:
    runs_here(backend, torch.bfloat16, slopes, 64)
    case = (lengths, window, slopes, kv_heads, 64)
    ours, exact = outputs(backend, torch.bfloat16, *case), outputs("eager", torch.float32, *case)
    for found, expected in zip(ours, exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert found.isfinite().all()
        # bfloat16 rounds by 0.4 %; a document of one token has gradients of exactly 0 for queries and keys
        assert (found.float() - expected).norm() <= 0.02 * expected.norm() + 1e-3 * max(sum(lengths), 1) ** 0.5


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("backend", ["flash2", "flash3", "flex"])
def test_neighbours_do_not_exist(backend: str, dim: int) -> None:
    """A document's output does not change by a bit when the one before it does."""
    runs_here(backend, torch.bfloat16, None, dim)
    first, second = (t.detach().bfloat16().cuda() for t in qkv_of(300, dim=dim)[:2])
    changed = torch.cat((first[:130] + 1, first[130:]))
    plan = AttentionPlan(torch.tensor([0, 130, 300], dtype=torch.int32, device="cuda"), 170, 300)
    for window in ((-1, -1), (64, 64)):
        before, after = (
            attend(x, x, second, plan, window_size=window, backend=backend)  # pyright: ignore[reportArgumentType]
            for x in (first, changed)
        )
        assert torch.equal(before[130:], after[130:])
        assert not torch.equal(before[:130], after[:130])


@pytest.mark.parametrize("backend", ["flash2", "flex"])
def test_kernels_never_make_the_host_wait(backend: str) -> None:
    runs_here(backend, torch.bfloat16, None, 64)
    case = (ODD_LENGTHS, (64, 64), None, 2, 64)
    outputs(backend, torch.bfloat16, *case)  # compiled, and tables made
    plan = AttentionPlan(torch.tensor([0, *ODD_LENGTHS]).cumsum(0).int().cuda(), max(ODD_LENGTHS), sum(ODD_LENGTHS))
    tensors = [t.detach().bfloat16().cuda().requires_grad_() for t in qkv_of(sum(ODD_LENGTHS), dim=64)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = attend(*tensors, plan, window_size=(64, 64), backend=backend)  # pyright: ignore
        out.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
