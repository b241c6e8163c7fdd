"""Products by oneDNN equal torch's own linear, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from flexbert.products import linear


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
