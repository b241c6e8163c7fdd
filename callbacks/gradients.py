"""Gradients and what they do to the weights: norm, clipping, update-to-weight ratio."""

import math
from typing import Any

import torch
from composer.core import State
from composer.loggers import Logger
from torch import Tensor
from torch.distributed.tensor import DTensor

import ranks
from callbacks.clock import Clock, Window
from callbacks.gauge import Gauge

_SAMPLE = 2**14  # weights of a matrix that are compared; the ratio is then within about 1 % of that of all


class Gradients(Gauge):
    """Clips by the global norm, where the run says so, and measures the step that a line is written for.

    | logged | unit | event, interval |
    |---|---|---|
    | grad_norm | 2-norm of the gradient of the line's step, before clipping; null: not finite | AFTER_TRAIN_BATCH |
    | update_ratio | 2-norm of that step's change of all matrices over the 2-norm of the matrices | BATCH_END |

    A step whose norm is not finite, though its gradients are, is left out with clipping as without.

    The ratio looks at up to 16,384 weights of each matrix, evenly spaced: there is no copy of the model. Weight decay
    is part of the change; a step that is not applied changes nothing.
    """

    def __init__(self, clock: Clock, clip_norm: float | None) -> None:
        super().__init__(clock)
        self.clip_norm = clip_norm
        self._norm: Tensor | None = None
        self._views: list[Tensor] = []  # the weights that are compared, as they are
        self._before, self._scale = torch.zeros(0), torch.zeros(0)  # what they were; weights that each stands for

    def after_train_batch(self, state: State, logger: Logger) -> None:
        due = (state.timestamp.batch.value + 1) % self.clock.log_interval == 0
        if not due and self.clip_norm is None:
            return
        parameters = [parameter for parameter in state.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.clip_norm is not None:
            # Over an infinite norm finite gradients would become 0: as NaN they are seen by the guard, which leaves the
            # step out, as it does without clipping.
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm + 0 * norm)
        if due:
            self._norm = norm
            samples = [_sample(parameter.detach()) for parameter in parameters if parameter.ndim > 1]
            self._views = [sample for sample, _ in samples]
            self._before = torch.cat([self._norm.new_zeros(0), *self._views]).double()
            counts = torch.tensor([len(view) for view in self._views])
            self._scale = torch.tensor([scale for _, scale in samples]).repeat_interleave(counts).to(self._before)

    def read(self, state: State, window: Window) -> dict[str, Any]:
        if self._norm is None:
            return {}
        norm, now = float(self._norm), torch.cat([self._norm.new_zeros(0), *self._views]).double()
        change, weight = (torch.dot(self._scale, x.square()) for x in (now - self._before, self._before))
        # Where every rank has all weights, both sums grow alike.
        change, weight = ranks.over_ranks(torch.stack([change, weight])).tolist()
        self._norm, self._views = None, []
        ratio = math.sqrt(change / weight) if weight else 0.0
        return {key: x if math.isfinite(x) else None for key, x in (("grad_norm", norm), ("update_ratio", ratio))}


def _sample(matrix: Tensor) -> tuple[Tensor, float]:
    """A view of at most _SAMPLE weights, of all columns, and the number of weights that each of them stands for."""
    local = matrix.to_local() if isinstance(matrix, DTensor) else matrix
    stride = -(-local.numel() // _SAMPLE) or 1
    while math.gcd(stride, local.shape[-1]) > 1:
        stride += 1
    sample = local.flatten()[::stride]
    return sample, local.numel() / max(len(sample), 1)
