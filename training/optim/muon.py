"""Muon and NorMuon for matrices, AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): the step of a matrix is its momentum with all
singular values made about 1,

    B = momentum * B + G;   O = NS(G + momentum * B);   W -= lr * (weight_decay * W + scale * O).

scale: 0.2 sqrt(max(rows, columns)), with which entries move by about 0.2 lr in the root mean square, as under AdamW
(Moonlight, arXiv 2502.16982, sec. 2.2, eq. 4), or sqrt(max(1, rows / columns)), the original. Decay: Moonlight, eq. 3.

NorMuon (arXiv 2510.05491, algorithm 1) divides each row of O, the step of one output, by the root of the mean of its
squares over the steps, and gives the whole its size back:

    v = beta2 * v + (1 - beta2) * mean over columns of O^2;   O' = O / (sqrt(v) + eps);   O' is scaled to |O|.

Its scale with `match_rms_adamw` is 0.2 sqrt(rows * columns) / |O'|, so that entries move by 0.2 lr exactly.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import ranks
from training.optim.matrices import MatricesWithAdamW, by_shape, gathered, move

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the original's: the steepest at 0 that keep singular values near 1
_STEPS = 5
_TOGETHER = 2**26
_TINY = 1e-10  # NorMuon's epsilon, of its authors' code


def orthogonalise(matrix: Tensor) -> Tensor:
    """U V^T of a matrix U S V^T, or of each of (..., rows, columns), but for singular values in about [0.7, 1.2];
    zeros stay zeros.

    Newton-Schulz: X = aX + (bA + cA^2) X, A = X X^T, five times from X = matrix / its Frobenius norm, along the shorter
    side; three batched products each, that add as they go. Singular values under about 2e-3 of that norm stay smaller.
    The result has the input's dtype; the products are in bfloat16 on CUDA, as in the original, and float32 or better
    elsewhere.
    """
    a, b, c = _COEFFICIENTS
    x = (matrix.bfloat16() if matrix.is_cuda else matrix).reshape(-1, *matrix.shape[-2:])
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).reshape(matrix.shape).to(matrix.dtype)


class Muon(MatricesWithAdamW):
    """See above. Options of a group: momentum, adjust_lr."""

    def step_matrices(self, group: dict[str, Any], matrices: list[nn.Parameter]) -> None:
        for alike in by_shape(matrices):
            for some in _chunks(alike):
                self._step_some(group, some)

    def _step_some(self, group: dict[str, Any], matrices: list[nn.Parameter]) -> None:
        """matrices: of one shape."""
        updates = []
        for matrix in matrices:
            gradient, state = matrix.grad, self.state[matrix]
            assert gradient is not None
            if not state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
            updates.append(gradient.add(momentum, alpha=group["momentum"]))
        whole = torch.stack([gathered(update) for update in updates])
        rows = group["parts"] or [whole.shape[1]]
        steps = ranks.shared_out(whole, lambda some: _orthogonal_parts(some, rows))
        for matrix, update, step in zip(matrices, updates, steps, strict=True):
            parts = [self.sized(group, part) for part in self.adapted(group, matrix, step).split(rows)]
            move(matrix, update, torch.cat(parts), group)

    def adapted(self, group: dict[str, Any], matrix: nn.Parameter, step: Tensor) -> Tensor:
        """step: (rows, columns), whose parts are orthogonal. The direction of the matrix."""
        return step

    def sized(self, group: dict[str, Any], part: Tensor) -> Tensor:
        """A part of the direction, as long as the learning rate wants it."""
        rows, columns = part.shape
        moonlight = group["adjust_lr"] == "match_rms_adamw"
        return part * (0.2 * math.sqrt(max(rows, columns)) if moonlight else math.sqrt(max(1, rows / columns)))


class NorMuon(Muon):
    """See above. Options of a group: those of Muon, and row_beta."""

    def adapted(self, group: dict[str, Any], matrix: nn.Parameter, step: Tensor) -> Tensor:
        state = self.state[matrix]
        if "row_squares" not in state:  # of the whole matrix, on every rank
            state["row_squares"] = step.new_zeros(len(step), 1)
        squares = state["row_squares"].lerp_(step.square().mean(1, keepdim=True), 1 - group["row_beta"])
        even = step / (squares.sqrt() + _TINY)
        rows = group["parts"] or [len(step)]
        sizes = [old.norm() / (new.norm() + _TINY) for old, new in zip(step.split(rows), even.split(rows), strict=True)]
        return torch.cat([part * size for part, size in zip(even.split(rows), sizes, strict=True)])

    def sized(self, group: dict[str, Any], part: Tensor) -> Tensor:
        if group["adjust_lr"] == "original":
            return super().sized(group, part)
        return part * (0.2 * math.sqrt(part.numel()) / (part.norm() + _TINY))


def _orthogonal_parts(matrices: Tensor, rows: list[int]) -> Tensor:
    """matrices: (count, rows, columns), each part of which is made orthogonal, parts of one shape together."""
    if len(set(rows)) == 1:
        return orthogonalise(matrices.unflatten(1, (len(rows), rows[0]))).flatten(1, 2)
    return torch.cat([orthogonalise(part) for part in matrices.split(rows, 1)], 1)


def _chunks(matrices: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Some 2^26 elements at a time: what is gathered from the ranks at once."""
    count = max(1, _TOGETHER // max(1, matrices[0].numel()))
    yield from (matrices[first : first + count] for first in range(0, len(matrices), count))
