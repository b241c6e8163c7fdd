"""A callback from outside the project: logs how large the weights are, every so many tokens.

imports: [weight_norm.py]
callbacks: [{name: weight_norm, interval: 1M}]
"""

from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from pydantic import Field
from torch.distributed.tensor import DTensor

from flexbert_core.schema import Component, Count
from recipe.phases import PhasePlan
from recipe.slots import CALLBACKS


@CALLBACKS.register("weight_norm")
class WeightNorm(Callback):
    """
    | logged | unit | event, interval |
    |---|---|---|
    | weights/norm | 2-norm of all parameters | BATCH_END, interval |
    | weights/measured | how often the run has measured it, restarts included | same |
    """

    class Config(Component):
        interval: Count = Field(1_000_000, gt=0, description="tokens between measurements")

    def __init__(self, config: Config, *, plan: PhasePlan, folder: Path) -> None:
        self.interval, self.plan = config.interval, plan
        self.measured = 0

    def batch_end(self, state: State, logger: Logger) -> None:
        if not self.plan.crosses(state.timestamp.batch.value, self.interval):
            return
        self.measured += 1
        norm = torch.nn.utils.get_total_norm([parameter.detach() for parameter in state.model.parameters()])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP2: each rank holds a part
        logger.log_metrics({"weights/norm": float(norm), "weights/measured": self.measured})

    def state_dict(self) -> dict[str, Any]:
        return {"measured": self.measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.measured = state["measured"]
