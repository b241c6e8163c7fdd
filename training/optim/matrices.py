"""Optimizers that take the blocks' matrices as matrices, with AdamW for the rest, in one: Composer takes one only.

The parts of a fused matrix (queries, keys and values; halves of a gated mlp) are matrices of their own, so fusing
changes nothing but rounding.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.adamw import adamw

from training.optim.groups import GroupsConfig, Settings


class MatricesWithAdamW(torch.optim.Optimizer):
    """A group of matrices for each way in which they divide into parts, then AdamW's groups, of all other parameters.

    A subclass has `step_matrices`, which moves the matrices of one group.
    """

    def __init__(
        self,
        model: nn.Module,
        config: GroupsConfig,
        matrices: Mapping[nn.Parameter, list[int]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        adamw_lr_factor: float = 1.0,
        **options: Any,
    ) -> None:
        """matrices: of the model, with the rows of each part. betas, eps: AdamW's. adamw_lr_factor: of AdamW's learning
        rate. options: the subclass's own, which all groups get."""
        settings = Settings(model, config)
        self.names = settings.names
        by_parts: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for matrix, rows in matrices.items():
            if matrix.requires_grad:
                by_parts.setdefault(tuple(rows) if len(rows) > 1 else (), []).append(matrix)
        groups = [
            {**group, "parts": list(rows)} for rows, params in by_parts.items() for group in settings.split(params)
        ]
        rest = [parameter for parameter in settings.names if parameter not in matrices]
        groups += [{**group, "parts": None} for group in settings.split(rest)]
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "adamw_lr_factor": adamw_lr_factor, **options})

    def step_matrices(self, group: dict[str, Any], matrices: list[nn.Parameter]) -> None:
        """Move matrices that have gradients, in place. group["parts"]: rows of each part, [] where they are one."""
        raise NotImplementedError

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
                self.step_matrices(group, params)
        return loss

    def _step_adamw(self, group: dict[str, Any], params: list[nn.Parameter]) -> None:
        for parameter in params:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.tensor(0.0, dtype=torch.float32),
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


def by_shape(params: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Those of one shape together, in their order."""
    found: dict[torch.Size, list[nn.Parameter]] = {}
    for matrix in params:
        found.setdefault(matrix.shape, []).append(matrix)
    yield from found.values()


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which ranks hold shards. A collective for those."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def move(matrix: nn.Parameter, like: Tensor, direction: Tensor, group: dict[str, Any]) -> None:
    """matrix -= lr * (weight_decay * matrix + direction). direction: whole, on every rank; like: laid out as the
    matrix, of which each rank moves its shard."""
    if isinstance(like, DTensor):
        copies = DTensor.from_local(direction, like.device_mesh, [Replicate()] * like.device_mesh.ndim)
        direction = copies.redistribute(placements=like.placements)
    matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
