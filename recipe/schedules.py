"""Slot `schedule`: the learning rate's shape over one phase, as a factor of the phase's `lr`."""

import math
from typing import Literal, Protocol

from pydantic import Field
from torch.optim import Optimizer

from flexbert_core.schema import Component, Registry

SCHEDULES = Registry("schedule")


class Schedule(Protocol):
    """The factor of the phase's lr in a step, besides that of the warmup.

    progress in [0, 1): share of the phase's tokens trained before the step. warmup in [0, 1]: share of the phase's
    tokens over which lr rises.
    """

    def __call__(self, progress: float, warmup: float) -> float: ...


class ScheduleConfig(Component):
    """Base of the entries' Config."""

    def check(self, warmup: int) -> None:
        """Raise ValueError `schedule: what is wrong: fix` for a phase whose warmup, in tokens, does not fit."""


@SCHEDULES.register("constant")
class Constant:
    """Factor 1: the stable part of warmup-stable-decay."""

    class Config(ScheduleConfig):
        pass

    def __init__(self, config: Config) -> None:
        pass

    def __call__(self, progress: float, warmup: float) -> float:
        return 1.0


@SCHEDULES.register("inverse_sqrt")
class InverseSqrt:
    """sqrt(w / t) after t tokens of the phase, from t = w on, w its warmup; before that 1, so lr has no jump.

    Vaswani et al. 2017, arXiv 1706.03762, eq. 3, where lr is 1 / sqrt(d_model * w): min(t^-0.5, t * w^-1.5) over
    w^-0.5. It needs no end, so a phase may be lengthened without moving what was trained.
    """

    class Config(ScheduleConfig):
        def check(self, warmup: int) -> None:
            if warmup == 0:
                raise ValueError("schedule: inverse_sqrt falls from the end of the warmup on: set warmup")

    def __init__(self, config: Config) -> None:
        pass

    def __call__(self, progress: float, warmup: float) -> float:
        return math.sqrt(warmup / max(warmup, progress))


class _Falling:
    class Config(ScheduleConfig):
        final: float = Field(default=0.001, ge=0, le=1, description="factor at the end of the phase")
        falls_from: Literal["warmup", "start"] = Field(
            default="warmup",
            description="the end of the phase's warmup, where lr is reached; start: of the phase, so that the rise "
            "multiplies what has fallen already, and lr is never quite reached",
        )

    def __init__(self, config: Config) -> None:
        self.final, self.falls_from = config.final, config.falls_from

    def shape(self, progress: float) -> float:
        """From 1 at 0 to 0 at 1. progress: share of the fall."""
        raise NotImplementedError

    def __call__(self, progress: float, warmup: float) -> float:
        if self.falls_from == "warmup" and warmup:
            # Before its end, and where the warmup is all of the phase, nothing has fallen.
            progress = (progress - warmup) / (1 - warmup) if progress > warmup else 0.0
        return self.final + (1 - self.final) * self.shape(progress)


@SCHEDULES.register("one_minus_sqrt")
class OneMinusSqrt(_Falling):
    """1 - sqrt(share of the fall): Haegele et al. 2024, arXiv 2405.18392, eq. 4; ModernBERT's third phase ends at
    0.001."""

    def shape(self, progress: float) -> float:
        return 1 - math.sqrt(progress)


@SCHEDULES.register("linear")
class Linear(_Falling):
    """1 - the share of the fall."""

    def shape(self, progress: float) -> float:
        return 1 - progress


@SCHEDULES.register("cosine")
class Cosine(_Falling):
    """Half a cosine wave: Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5 without restarts."""

    def shape(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


def falls(name: str) -> bool:
    """Whether the schedule of this name falls to `final` at the end of its phase."""
    entry = SCHEDULES.entries.get(name)
    return entry is not None and issubclass(entry.Config, _Falling.Config)


def set_learning_rate(optimizer: Optimizer, lr: float, peak: float | None = None) -> None:
    """Of every group, by its factor. peak: the phase's, to which decoupled decay is relative: a group's decay has its
    factor too, and one of factor 0 stays as it is."""
    for group in optimizer.param_groups:
        factor = group.get("lr_factor", 1.0)  # an optimizer of others may know no factors
        group["lr"] = lr * factor
        if peak is not None and group.get("max_lr") is not None:
            group["max_lr"] = peak
