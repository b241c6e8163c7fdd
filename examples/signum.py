"""Slot `optimizer`: steps of one size, in the direction of the momentum's sign (Signum, Bernstein et al. 2018,
arXiv 1802.04434, algorithm 2)."""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import nn

from training.optim.groups import GroupsConfig, parameter_groups
from training.optim.optimizers import OPTIMIZERS


class _Signum(torch.optim.Optimizer):
    """m = beta m + (1 - beta) g; then W -= lr * (sign(m) + weight_decay W)."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, beta: float) -> None:
        super().__init__(groups, {"lr": lr, "beta": beta, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                mean = state["exp_avg"].lerp_(parameter.grad, 1 - group["beta"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(mean.sign(), alpha=group["lr"])
        return loss


@OPTIMIZERS.register("signum")
class Signum:
    """Signum, which keeps one number for each parameter, where AdamW keeps two."""

    works_on_shards = True  # each entry's step depends on that entry alone, so a rank may hold any part (fsdp2)

    class Config(GroupsConfig):
        beta: float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients")
        weight_decay: float = Field(0.1, ge=0, description="a step decays by weight_decay * lr")

    def __new__(cls, config: Any, *, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return _Signum(parameter_groups(model, config), lr=lr, beta=config.beta)
