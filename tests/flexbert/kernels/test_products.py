"""Products by oneDNN equal torch's own linear, forward and backward; in bfloat16 on any CPU, those of exact sums."""

import pytest
import torch
import torch.nn.functional as F

from flexbert.kernels import linear
from flexbert.kernels.cpu import lacks
from flexbert.losses import masked_cross_entropy


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 5, 3), (0, 5, 3), (7, 1, 1), (130, 384, 1152), (2, 33, 48, 31)], ids=str)
def test_linear_equals_torch(shape: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    *rows, inputs, outputs = shape
    given = [torch.randn(*rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)]
    given += [torch.randn(outputs, generator=generator)] if bias else []
    weights = torch.randn(*rows, outputs, generator=generator)
    found = []
    for function in (linear, F.linear):
        tensors = [tensor.clone().requires_grad_() for tensor in given]
        out = function(*tensors)
        found.append([out, *torch.autograd.grad((out * weights).sum(), tensors)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 130, 2049])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_rounds_factors_and_result_and_nothing_else(rows: int, bias: bool, autocast: bool) -> None:
    """Against float64 products of the rounded factors: whatever instructions this CPU has."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(rows, 384, generator=generator), torch.randn(96, 384, generator=generator)]
    given += [torch.randn(96, generator=generator)] if bias else []
    gradient = torch.randn(rows, 96, generator=generator).bfloat16()
    tensors = [tensor if autocast else tensor.bfloat16() for tensor in given]
    for tensor in tensors:
        tensor.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = linear(*tensors)
    assert out.dtype == torch.bfloat16
    found = [out, *torch.autograd.grad(out, tensors, gradient)]
    exact = [tensor.detach().bfloat16().double().requires_grad_() for tensor in given]
    expected = F.linear(*exact)
    references = [expected, *torch.autograd.grad(expected, exact, gradient.double())]
    for ours, reference in zip(found, references, strict=True):
        # Half a unit in the last of bfloat16's 8 bits, and float32 sums
        torch.testing.assert_close(ours.double(), reference, rtol=2**-8 * 1.01, atol=1e-3)


def test_the_loss_in_bfloat16_is_that_of_rounded_factors() -> None:
    """Loss and gradients against float64, from hidden states and weights that bfloat16 holds exactly.

    CPUs differ in the logits. One with bfloat16 products (AVX512-BF16, AMX) writes them in bfloat16, as CUDA does; one
    that lacks them has float32 logits of the same rounded factors, and keeps them.
    """
    generator = torch.Generator().manual_seed(0)
    # More classes than are rounded at a time, and masked tokens that share chunks with others
    states, weight = (torch.randn(n, 64, generator=generator).bfloat16().float() for n in (50, 2**15))
    targets = torch.randint(0, 2**15, (50,), generator=generator)
    tensors = [x.clone().requires_grad_() for x in (states, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = masked_cross_entropy(tensors[0], tensors[1], None, targets)
    exact = [x.double().requires_grad_() for x in (states, weight)]
    logits = exact[0] @ exact[1].T
    if not lacks(torch.bfloat16, "cpu"):
        rounded = logits.detach().bfloat16().double()
        assert (rounded - logits).norm() / logits.norm() > 1e-3  # so the two kinds of CPU can be told apart
        logits = logits + (rounded - logits).detach()
    expected = F.cross_entropy(logits, targets, reduction="sum")
    pairs = zip(
        [loss, *torch.autograd.grad(loss, tensors)], [expected, *torch.autograd.grad(expected, exact)], strict=True
    )
    for ours, reference in pairs:
        assert float((ours.double() - reference).norm() / reference.norm()) < 0.005  # bfloat16: 8 bits
