"""What a run measures beside its loss: the gauges of callbacks/, made for a config."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from callbacks.clock import Clock
from callbacks.efficiency import Efficiency
from callbacks.forecast import Forecast
from callbacks.gauge import Gauge, Reading
from callbacks.gradients import Gradients
from callbacks.guards import StepGuard
from callbacks.loss import Loss
from callbacks.loss_parts import LossParts
from callbacks.memory import Memory
from callbacks.streams import StreamScores
from flexbert import FlexBertForMaskedLM
from flexbert.peaks import peak_flops
from recipe.config import RunConfig
from recipe.cost import phase_flops
from recipe.phases import PhasePlan
from recipe.slots import OBJECTIVES


def build_gauges(
    config: RunConfig,
    plan: PhasePlan,
    model: FlexBertForMaskedLM,
    clock: Clock,
    guard: StepGuard,
    seconds: Callable[[], float],
) -> list[Gauge]:
    """In the order in which their values stand in a line. seconds: wall clock of the run so far."""
    trainer = config.trainer
    peak = trainer.peak_flops
    if peak is None and torch.cuda.is_available():
        peak = peak_flops(torch.cuda.get_device_name())

    def flops(phase: int, lengths: NDArray[np.int64], masked: NDArray[np.int64]) -> float:
        return phase_flops(config, plan.phases[phase], lengths, masked)

    return [
        Loss(clock, guard),
        Reading(clock, lambda: _rope_theta(model)),
        StreamScores(clock, list(config.data.streams)),
        LossParts(clock, _loss_parts(plan)),
        Gradients(clock, trainer.gradient_clip_norm),
        Efficiency(clock, guard, flops, peak),
        Memory(clock),
        Forecast(clock, plan, seconds, trainer.price_per_hour),
    ]


def gauges_state(clock: Clock, gauges: list[Gauge]) -> dict[str, Any]:
    """JSON values of what a line in the making has counted. A collective."""
    loss, *others = gauges
    states = {type(gauge).__name__: gauge.state_dict() for gauge in others}
    return {"train_seconds": clock.train_seconds, "window": loss.state_dict(), "gauges": states}


def load_gauges(clock: Clock, gauges: list[Gauge], state: dict[str, Any]) -> None:
    """Go on counting from there."""
    loss, *others = gauges
    clock.train_seconds = state["train_seconds"]
    loss.load_state_dict(state["window"])
    for gauge in others:
        gauge.load_state_dict(state["gauges"].get(type(gauge).__name__, {}))


def _loss_parts(plan: PhasePlan) -> list[str]:
    """Names of the parts that the objectives' losses have."""
    entries = [OBJECTIVES.entries[phase.objective.name] for phase in plan.phases]
    return list(dict.fromkeys(name for entry in entries for name in getattr(entry, "loss_parts", ())))


def _rope_theta(model: FlexBertForMaskedLM) -> dict[str, Any]:
    """rope_theta: {global, local}, as the model has them now; nothing for other positions."""
    position = model.config.position
    if not hasattr(position, "global_theta"):
        return {}
    return {"rope_theta": {"global": position.global_theta, "local": position.local_theta}}
