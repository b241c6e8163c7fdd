"""An exponential moving average of the weights, kept beside them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor, nn

from recipe.phases import PhasePlan


class WeightAverage(Callback):
    """average = decay * average + (1 - decay) * weights, in float32, at the steps that are due.

    The n-th update gives the weights a share of 1/n where that is more than 1 - decay: the first ones are a plain mean,
    and the starting weights are never in it. A function of the steps alone, so neither world size nor restarts matter.
    Cost: one more copy of the parameters, on their device.

    | logged | unit | event |
    |---|---|---|
    | nothing; see `validation_ema` of metrics.jsonl | | BATCH_END |
    """

    def __init__(self, model: nn.Module, decay: float, plan: PhasePlan, every: int | None) -> None:
        """every: tokens between updates; None: after each step."""
        self.model, self.decay, self.plan, self.every = model, decay, plan, every
        self.updates = 0
        self._average: dict[str, Tensor] = {}

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.every is None or self.plan.crosses(state.timestamp.batch.value, self.every):
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are."""
        self.updates += 1
        share = max(1 - self.decay, 1 / self.updates)
        for name, parameter in self.model.named_parameters():
            if self.updates == 1:
                self._average[name] = parameter.detach().clone().float()
            else:
                self._average[name].lerp_(parameter.float(), share)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model has the average for weights in the block, and its own again after it. Nothing else may train."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # In place, one tensor at a time: optimizer, DDP and FSDP hold the parameters themselves.
        for name, parameter in self.model.named_parameters():
            weights = parameter.detach().clone()
            parameter.copy_(self._average[name])
            self._average[name].copy_(weights)

    def tensors(self) -> Mapping[str, Tensor]:
        """By name of the parameter, for the checkpoint; later updates change them in place. Empty before the first."""
        return self._average

    def state_dict(self) -> dict[str, Any]:
        """JSON values for the checkpoint, besides the tensors."""
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self.updates = state["updates"]
        devices = {name: parameter.device for name, parameter in self.model.named_parameters()}
        self._average = {name: tensor.to(devices[name], copy=True) for name, tensor in tensors.items()}
