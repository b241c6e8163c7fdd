"""StableAdamW for parameters of which each rank holds a part (FSDP2)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from optimi import StableAdamW
from optimi.utils import debias_beta
from torch import Tensor
from torch.distributed.tensor import DTensor


class ShardedStableAdamW(StableAdamW):
    """torch-optimi's StableAdamW, which it is for plain parameters; its state is the same for sharded ones, so either
    continues what the other began.

    Its own step divides the learning rate of each tensor by the root mean square of grad^2 / max(exp_avg_sq, eps^2)
    where that is over 1 (arXiv 2304.13013, algorithm 2). The mean is over the whole tensor, of which a rank sees a
    part: here all ranks' sums are added up, for all tensors in one collective.
    """

    @torch.no_grad()
    def step(self, closure: Callable[..., Any] | None = None, param: Tensor | None = None) -> Any:
        if not any(isinstance(parameter, DTensor) for group in self.param_groups for parameter in group["params"]):
            return super().step(closure, param)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parts = [part for group in self.param_groups for part in self._parts(group)]
        sums = torch.stack([square_sum for *_, square_sum in parts])
        torch.distributed.all_reduce(sums)
        for (group, parameter, exp_avg, exp_avg_sq, size, _), square_sum in zip(parts, sums.tolist(), strict=True):
            lr = group["lr"] / max(1.0, (square_sum / size) ** 0.5)
            if group["weight_decay"]:
                parameter.mul_(1 - lr / (group["max_lr"] if group["decouple_lr"] else 1.0) * group["weight_decay"])
            parameter.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(group["eps"]), value=-lr)
        return loss

    def _parts(self, group: dict[str, Any]) -> list[tuple[dict[str, Any], Tensor, Tensor, Tensor, int, Tensor]]:
        """Moves a group's means on. Of each tensor with a gradient: (group; this rank's part of parameter, exp_avg and
        exp_avg_sq; elements of the whole tensor; this rank's sum of grad^2 / max(exp_avg_sq, eps^2))."""
        params, grads, exp_avgs, exp_avg_sqs = [], [], [], []
        self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, [], [], [])
        group["step"] += 1
        step = int(group["step"])
        weights = [1 - debias_beta(group[beta], step) for beta in ("beta1", "beta2")]
        parts = []
        for whole, *rest in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
            parameter, grad, exp_avg, exp_avg_sq = (_local(tensor) for tensor in (whole, *rest))
            exp_avg.lerp_(grad, weights[0])
            exp_avg_sq.mul_(1 - weights[1]).addcmul_(grad, grad, value=weights[1])
            square_sum = grad.square().div_(exp_avg_sq.clamp_min(group["eps"] ** 2)).sum(dtype=torch.float32)
            parts.append((group, parameter, exp_avg, exp_avg_sq, whole.numel(), square_sum))
        return parts


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
