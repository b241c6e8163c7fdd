"""Muon for matrices and AdamW for the rest, in one optimizer: Composer takes only one.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): the step of a matrix is its momentum with all
singular values made about 1,

    B = momentum * B + G;   W -= lr * (weight_decay * W + scale * NS(G + momentum * B)).

scale: 0.2 sqrt(max(rows, columns)), with which entries move by about 0.2 lr in the root mean square, as under AdamW
(Moonlight, arXiv 2502.16982, sec. 2.2, eq. 4), or sqrt(max(1, rows / columns)), the original. Decay: Moonlight, eq. 3.

The parts of a fused matrix (queries, keys and values; halves of a gated mlp) are matrices of their own: each is
orthogonalised and scaled alone, so fusing changes nothing but rounding.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.adamw import adamw

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the original's: the steepest at 0 that keep singular values near 1
_STEPS = 5


def orthogonalise(matrix: Tensor) -> Tensor:
    """U V^T of a matrix U S V^T, but for singular values in about [0.7, 1.2] instead of 1; zeros stay zeros.

    Newton-Schulz: X = aX + (bA + cA^2) X, A = X X^T, five times from X = matrix / its Frobenius norm, along the shorter
    side. Singular values under about 2e-3 of that norm stay smaller. The result has the input's dtype; the products are
    in bfloat16 on CUDA, as in the original, and float32 or better elsewhere.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.T).to(matrix.dtype)


class MuonWithAdamW(torch.optim.Optimizer):
    """See above. One group of matrices for each way in which they divide into parts, then AdamW's groups."""

    def __init__(
        self,
        matrices: Mapping[nn.Parameter, list[int]],
        others: Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        adjust_lr: Literal["match_rms_adamw", "original"],
        adamw_lr_factor: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """matrices: with the rows of each part. others: groups of parameters with their weight_decay, for AdamW."""
        by_parts: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for matrix, rows in matrices.items():
            if matrix.requires_grad:
                by_parts.setdefault(tuple(rows) if len(rows) > 1 else (), []).append(matrix)
        groups: list[dict[str, Any]] = [
            {"params": params, "weight_decay": weight_decay, "parts": list(rows)} for rows, params in by_parts.items()
        ]
        groups += [{**group, "parts": None} for group in others]
        options = {"lr": lr, "momentum": momentum, "adjust_lr": adjust_lr, "adamw_lr_factor": adamw_lr_factor}
        super().__init__(groups, {**options, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """closure: computes gradients and returns the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["parts"] is None:
                self._step_adamw(group, params)
            else:
                for matrix in params:
                    self._step_muon(group, matrix)
        return loss

    def _step_muon(self, group: dict[str, Any], matrix: nn.Parameter) -> None:
        gradient, state = matrix.grad, self.state[matrix]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        update = gradient.add(momentum, alpha=group["momentum"])
        # A sharded matrix is gathered: each rank computes the whole step and keeps its shard.
        whole = update.full_tensor() if isinstance(update, DTensor) else update
        parts = whole.split(group["parts"] or whole.shape[0])
        whole = torch.cat([orthogonalise(part) * _scale(part, group["adjust_lr"]) for part in parts])
        if isinstance(update, DTensor):
            copies = DTensor.from_local(whole, update.device_mesh, [Replicate()] * update.device_mesh.ndim)
            whole = copies.redistribute(placements=update.placements)
        matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(whole, alpha=-group["lr"])

    def _step_adamw(self, group: dict[str, Any], params: list[nn.Parameter]) -> None:
        for parameter in params:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in params]
        beta1, beta2 = group["betas"]
        adamw(
            list[Tensor](params),
            [parameter.grad for parameter in params if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"] * group["adamw_lr_factor"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _scale(part: Tensor, adjust_lr: str) -> float:
    rows, columns = part.shape
    return 0.2 * math.sqrt(max(rows, columns)) if adjust_lr == "match_rms_adamw" else math.sqrt(max(1, rows / columns))
