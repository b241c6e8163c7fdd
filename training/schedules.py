"""Slot `schedule`: the learning rate's shape over one phase, as a factor of the phase's `lr`."""

import math
from typing import Protocol

from pydantic import Field

from schema import Component, Registry

SCHEDULES = Registry("schedule")


class Schedule(Protocol):
    """progress in [0, 1): share of the phase's tokens trained before the step. Returns the factor of the phase's lr."""

    def __call__(self, progress: float) -> float: ...


@SCHEDULES.register("constant")
class Constant:
    """Factor 1: the stable part of warmup-stable-decay."""

    class Config(Component):
        pass

    def __init__(self, config: Config) -> None:
        pass

    def __call__(self, progress: float) -> float:
        return 1.0


class _Falling:
    class Config(Component):
        final: float = Field(default=0.001, ge=0, le=1, description="factor at the end of the phase")

    def __init__(self, config: Config) -> None:
        self.final = config.final

    def shape(self, progress: float) -> float:
        """From 1 at progress 0 to 0 at progress 1."""
        raise NotImplementedError

    def __call__(self, progress: float) -> float:
        return self.final + (1 - self.final) * self.shape(progress)


@SCHEDULES.register("one_minus_sqrt")
class OneMinusSqrt(_Falling):
    """1 - sqrt(progress): Haegele et al. 2024, arXiv 2405.18392, eq. 4; ModernBERT's third phase ends at 0.001."""

    def shape(self, progress: float) -> float:
        return 1 - math.sqrt(progress)


@SCHEDULES.register("linear")
class Linear(_Falling):
    """1 - progress."""

    def shape(self, progress: float) -> float:
        return 1 - progress


@SCHEDULES.register("cosine")
class Cosine(_Falling):
    """Half a cosine wave: Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5 without restarts."""

    def shape(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))
