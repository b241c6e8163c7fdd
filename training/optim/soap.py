"""SOAP for matrices, AdamW for the rest.

SOAP (arXiv 2409.11321, algorithm 3) is Adam in the basis in which Shampoo's preconditioner is diagonal: with means
L of G G^T and R of G^T G, and bases Q_L and Q_R of their eigenvectors,

    M = beta1 M + (1 - beta1) G;   G' = Q_L^T G Q_R;   M' = Q_L^T M Q_R;
    V = beta2 V + (1 - beta2) G'^2;   W -= lr * (weight_decay * W + Q_L (M' / sqrt(V)) Q_R^T),

with Adam's correction of the first means. The bases are those of the steps before. Every `frequency` steps each is
turned towards the eigenvectors by one step of power iteration and QR (algorithm 4). As in the authors' code, the first
step moves nothing but L and R, whose eigenvectors are the first bases, and columns are put in the order of their
eigenvalues before QR, V with them. As there, 1e-30 is added to the diagonal before eigenvectors are taken, and where
they are not found in float32, they are sought in float64.
"""

from typing import Any

import torch
from torch import Tensor, nn

from flexbert_core.schema import RunError
from training.optim.matrices import MatricesWithAdamW


class Soap(MatricesWithAdamW):
    """See above. Options of a group: soap_betas, frequency. States of a part are those of its matrix, numbered."""

    def step_matrices(self, group: dict[str, Any], matrices: list[nn.Parameter]) -> None:
        for matrix in matrices:
            assert matrix.grad is not None
            state = self.state[matrix]
            if not state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(matrix), torch.zeros_like(matrix)
            state["step"] += 1
            rows = group["parts"] or [len(matrix)]
            tensors = [tensor.split(rows) for tensor in (matrix.grad, state["exp_avg"], state["exp_avg_sq"])]
            directions = [
                self._direction(group, state, number, *part, name=self.names[matrix])
                for number, part in enumerate(zip(*tensors, strict=True))
            ]
            if int(state["step"]) > 1:
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(torch.cat(directions), alpha=-group["lr"])

    def _direction(
        self,
        group: dict[str, Any],
        state: dict[str, Any],
        number: int,
        gradient: Tensor,
        mean: Tensor,
        squares: Tensor,
        *,
        name: str,
    ) -> Tensor:
        """Of one part (rows, columns), whose means are moved on. name: of the matrix, for an error."""
        beta1, beta2 = group["soap_betas"]
        step = int(state["step"]) - 1  # that move weights
        if not step:
            for side, product in (("left", gradient @ gradient.mT), ("right", gradient.mT @ gradient)):
                state[f"{side}_{number}"] = product * (1 - beta2)
                state[f"{side}_basis_{number}"] = _eigenvectors(product, name).flip(1)
            return gradient
        left, right = state[f"left_basis_{number}"], state[f"right_basis_{number}"]
        mean.lerp_(gradient, 1 - beta1)
        squares.lerp_((left.mT @ gradient @ right).square(), 1 - beta2)
        roots = (squares / (1 - beta2**step)).sqrt().add_(group["eps"])
        direction = left @ ((left.mT @ mean @ right) / (1 - beta1**step) / roots) @ right.mT
        state[f"left_{number}"].lerp_(gradient @ gradient.mT, 1 - beta2)
        state[f"right_{number}"].lerp_(gradient.mT @ gradient, 1 - beta2)
        if step % group["frequency"] == 0:
            for side, axis in (("left", 0), ("right", 1)):
                basis, order = _turned(state[f"{side}_{number}"], state[f"{side}_basis_{number}"])
                state[f"{side}_basis_{number}"] = basis
                squares.copy_(squares.index_select(axis, order))
        return direction


def _eigenvectors(product: Tensor, name: str) -> Tensor:
    """Of a symmetric product, in the order of their eigenvalues. Raises RunError where they are not found."""
    for dtype in (product.dtype, torch.float64):
        jitter = 1e-30 * torch.eye(len(product), dtype=dtype, device=product.device)
        try:
            return torch.linalg.eigh(product.to(dtype) + jitter)[1].to(product.dtype)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            continue
    raise RunError(
        f"optimizer: soap finds no eigenvectors of the first gradient of {name}, nor in float64: set "
        "trainer.gradient_clip_norm, which keeps its squares small, or take another optimizer"
    )


def _turned(product: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """(basis, order): a basis nearer to the eigenvectors of a symmetric product, and which old column each new one
    comes from: those of large eigenvalues first."""
    image = product @ basis
    order = (basis * image).sum(0).argsort(descending=True, stable=True)
    return torch.linalg.qr(image[:, order])[0], order
