"""Slot `optimizer`: steps of one size, in the direction of the sign (Lion, Chen et al. 2023, arXiv 2302.06675)."""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import nn

from flexbert_core.schema import Component
from training.optim.optimizers import OPTIMIZERS, Decayed, parameter_groups


class _Lion(torch.optim.Optimizer):
    """W -= lr * (sign(b1 m + (1 - b1) g) + weight_decay W); then m = b2 m + (1 - b2) g."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                mean = state["exp_avg"]
                update = mean.lerp(parameter.grad, 1 - first).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
                mean.lerp_(parameter.grad, 1 - second)
        return loss


@OPTIMIZERS.register("lion")
class Lion:
    """Lion, which keeps one number for each parameter, where AdamW keeps two."""

    works_on_shards = True  # each entry's step depends on that entry alone, so a rank may hold any part (fsdp2)

    class Config(Component):
        beta1: float = Field(0.9, ge=0, lt=1, description="share of the mean in the direction of a step")
        beta2: float = Field(0.99, ge=0, lt=1, description="decay of the mean of gradients")
        weight_decay: float = Field(0.1, ge=0, description="a step decays by weight_decay * lr")
        decayed: Decayed = Field("matrices", description="what decays: matrices, those that are no embeddings, or all")

    def __new__(cls, config: Any, *, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return _Lion(parameter_groups(model, config), lr=lr, betas=(config.beta1, config.beta2))
