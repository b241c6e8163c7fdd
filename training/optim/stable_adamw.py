"""StableAdamW where torch-optimi's own step does not serve: on CUDA, and for parts of parameters (FSDP2)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from optimi import StableAdamW
from optimi.utils import debias_beta
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ranks import add_up

_foreach: Any = torch  # its operations on lists of tensors have no public names


class _Tensors(NamedTuple):
    """This rank's parts of a group's parameters that have gradients, and each one's share of its mean square."""

    group: dict[str, Any]
    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    mean_squares: Tensor  # (params,) float32: of grad^2 / max(exp_avg_sq, eps^2), this rank's part of each mean


class ShardedStableAdamW(StableAdamW):
    """torch-optimi's StableAdamW, which it is for whole parameters on the CPU; its state is the same for all others, so
    either continues what the other began.

    It divides the learning rate of each tensor by the root mean square of grad^2 / max(exp_avg_sq, eps^2) where that is
    over 1 (arXiv 2304.13013, algorithm 2). Its kernel for CUDA sums that by atomic additions, in an order that differs
    from run to run (0.3.3): a resumed run would not be the run. And the mean is over the whole tensor, of which a rank
    may see a part. Here sums have one order, those of the ranks that share a copy are added up, for all tensors in one
    collective, and the host waits for nothing.
    """

    @torch.no_grad()
    def step(self, closure: Callable[..., Any] | None = None, param: Tensor | None = None) -> Any:
        params = [each for group in self.param_groups for each in group["params"]]
        mesh = next((each.device_mesh for each in params if isinstance(each, DTensor)), None)
        if mesh is None and all(each.device.type == "cpu" for each in params):
            return super().step(closure, param)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_together(mesh)
        return loss

    def step_together(self, mesh: DeviceMesh | None) -> None:
        """mesh: of the parameters, where other ranks hold the rest of them."""
        parts = [part for part in map(self._move_means, self.param_groups) if part.params]
        if not parts:
            return
        mean_squares = torch.cat([part.mean_squares for part in parts])
        if mesh is not None:
            add_up(mean_squares, mesh)
        for part, means in zip(parts, mean_squares.split([len(part.params) for part in parts]), strict=True):
            group = part.group
            lrs = group["lr"] / means.sqrt().clamp_min(1.0)
            if group["weight_decay"]:
                decay = lrs / (group["max_lr"] if group["decouple_lr"] else 1.0) * group["weight_decay"]
                _foreach._foreach_mul_(part.params, list((1 - decay).unbind()))
            roots = _foreach._foreach_sqrt(part.exp_avg_sqs)
            _foreach._foreach_add_(roots, group["eps"])
            updates = _foreach._foreach_div(part.exp_avgs, roots)
            _foreach._foreach_mul_(updates, list(lrs.unbind()))
            _foreach._foreach_sub_(part.params, updates)

    def _move_means(self, group: dict[str, Any]) -> _Tensors:
        """Move a group's means on, by the gradients."""
        wholes, grads, exp_avgs, exp_avg_sqs = [], [], [], []
        self._init_group(group, wholes, grads, exp_avgs, exp_avg_sqs, [], [], [])
        group["step"] += 1
        if not wholes:
            return _Tensors(group, [], [], [], torch.empty(0))
        step = int(group["step"])
        weights = [1 - debias_beta(group[beta], step) for beta in ("beta1", "beta2")]
        sizes = [whole.numel() for whole in wholes]
        params, grads, exp_avgs, exp_avg_sqs = (
            [_local(tensor) for tensor in tensors] for tensors in (wholes, grads, exp_avgs, exp_avg_sqs)
        )
        _foreach._foreach_lerp_(exp_avgs, grads, weights[0])
        _foreach._foreach_mul_(exp_avg_sqs, 1 - weights[1])
        _foreach._foreach_addcmul_(exp_avg_sqs, grads, grads, weights[1])
        roots = _foreach._foreach_maximum(exp_avg_sqs, group["eps"] ** 2)
        _foreach._foreach_sqrt_(roots)
        norms = _foreach._foreach_norm(_foreach._foreach_div(grads, roots))
        _foreach._foreach_div_(norms, [size**0.5 for size in sizes])
        return _Tensors(group, params, exp_avgs, exp_avg_sqs, torch.stack(list(norms)).square())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
