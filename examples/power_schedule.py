"""Slot `schedule`: the learning rate falls as (1 - progress)^power over its phase."""

from pydantic import Field

from recipe.schedules import SCHEDULES, ScheduleConfig


@SCHEDULES.register("power")
class Power:
    """final + (1 - final) * (1 - progress)^power; `linear` is power 1."""

    class Config(ScheduleConfig):
        power: float = Field(2.0, gt=0, description="over 1: most of the fall comes first")
        final: float = Field(0.0, ge=0, le=1, description="factor at the end of the phase")

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, progress: float, warmup: float) -> float:
        """progress: share of the phase's tokens trained before the step, in [0, 1). -> factor of the phase's lr."""
        return self.config.final + (1 - self.config.final) * (1 - progress) ** self.config.power
