"""What a student's softmax lacks of its teacher's.   M tokens, D hidden, V vocabulary."""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flexbert.losses import CHUNK_ELEMENTS, CHUNK_ELEMENTS_DEFAULT


class Scored(NamedTuple):
    """What gives logits: states (M, D) @ weight (V, D).T + bias (V,), or without."""

    states: Tensor
    weight: Tensor
    bias: Tensor | None


def divergence(student: Scored, teacher: Scored, temperature: float) -> Tensor:
    """Sum over tokens of T^2 KL(teacher's softmax || student's), both of logits / T (Hinton et al. 2015, arXiv
    1503.02531, section 2: T^2 keeps the gradient's size). A float32 scalar; 0 for no tokens.

    The teacher has no gradient. Products run in autocast's dtype if it is on, the rest in float32. Logits exist for a
    chunk of tokens at a time, and are made again in backward.
    """
    count, elements = len(student.states), CHUNK_ELEMENTS.get(student.states.device.type, CHUNK_ELEMENTS_DEFAULT)
    pieces = -(-count * len(student.weight) // elements)
    bounds = [count * number // max(pieces, 1) for number in range(pieces + 1)]
    total = torch.zeros((), dtype=torch.float32, device=student.states.device)
    for first, last in itertools.pairwise(bounds):
        states = student.states[first:last], teacher.states[first:last].detach()
        rest = student.weight, student.bias, teacher.weight.detach(), teacher.bias, temperature
        found = checkpoint(_of_chunk, *states, *rest, use_reentrant=False, preserve_rng_state=False)
        total = total + found  # pyright: ignore[reportOperatorIssue]
    return total


def _of_chunk(
    states: Tensor,
    theirs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    their_weight: Tensor,
    their_bias: Tensor | None,
    temperature: float,
) -> Tensor:
    with torch.no_grad():
        wanted = F.linear(theirs, their_weight, their_bias).float().div_(temperature).log_softmax(1)
    given = (F.linear(states, weight, bias).float() / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(given, wanted, reduction="sum", log_target=True)
