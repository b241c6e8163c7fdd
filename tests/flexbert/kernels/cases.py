"""Packed batches of queries, keys and values, for the tests of attention."""

import torch
from torch import Tensor

from tests.helpers.models import ODD_LENGTHS

# Measured worst case over all cases here: 3.0e-6 (8192 keys), else 1.2e-6, on values up to 6.5.
TOLERANCE = 1e-5

LENGTHS = [
    ODD_LENGTHS,
    (1,),
    (64,),
    (65,),
    (127, 128, 129),
    (128, 128, 128),
    (0, 5, 0, 0, 100, 0),
    (300,),
    (3,) * 50,
    (500, 20, 480, 20, 20, 31, 33, 370),
    (),
    (0,),
    (0, 0),
]


QKV = tuple[Tensor, Tensor, Tensor]


def qkv_of(total: int, heads: int = 2, dim: int = 16, seed: int = 0) -> QKV:
    generator = torch.Generator().manual_seed(seed)
    queries, keys, values = torch.randn(3, total, heads, dim, generator=generator).unbind()
    return queries.clone().requires_grad_(), keys.clone().requires_grad_(), values.clone().requires_grad_()


def detached(tensors: QKV, dtype: torch.dtype = torch.float32, device: str = "cpu") -> QKV:
    queries, keys, values = (tensor.detach().to(device, dtype) for tensor in tensors)
    return queries, keys, values


SLOPES = torch.tensor([0.25, 0.0625])
