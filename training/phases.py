"""Phases resolved to steps: everything about step k that the config decides, without looking at data or state."""

import math
from dataclasses import dataclass
from typing import Any

from data.lanes import LongDocuments
from data.loader import LoaderConfig, LoaderPhase
from data.masking import MaskingConfig
from data.mixture import StreamShare
from training.config import RunConfig
from training.schedules import SCHEDULES, Schedule


@dataclass(frozen=True)
class Phase:
    """A phase with nothing left to inherit. Tokens are slots: global_batch_size x max_seq_len a step."""

    name: str
    first_step: int
    steps: int
    first_token: int
    max_seq_len: int
    global_batch_size: int
    peak_lr: float
    warmup: int
    schedule: Schedule
    theta_global: float | None
    theta_local: float | None
    masking: MaskingConfig
    streams: dict[str, StreamShare] | None
    long_documents: LongDocuments | None

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.max_seq_len

    @property
    def end_step(self) -> int:
        return self.first_step + self.steps

    @property
    def end_token(self) -> int:
        return self.first_token + self.steps * self.tokens_per_step

    def lr(self, step: int) -> float:
        """Learning rate of a step of this phase. Warmup: linear, reaching the peak with the step that completes it."""
        done = (step - self.first_step) * self.tokens_per_step
        rise = min(1.0, (done + self.tokens_per_step) / self.warmup) if self.warmup else 1.0
        return self.peak_lr * rise * self.schedule(done / (self.steps * self.tokens_per_step))


class PhasePlan:
    """The phases of a run in order."""

    def __init__(self, config: RunConfig) -> None:
        self.phases: list[Phase] = []
        values: dict[str, Any] = {"max_seq_len": 0, "global_batch_size": 0, "lr": 0.0, "masking": config.masking}
        values |= {"streams": None, "long_documents": None}
        theta: list[float | None] = [None, None]
        step = token = 0
        for phase in config.phases:
            values |= {key: value for key in values if (value := getattr(phase, key)) is not None}
            theta = [phase.rope_theta.global_layers or theta[0], phase.rope_theta.local_layers or theta[1]]
            per_step = values["global_batch_size"] * values["max_seq_len"]
            steps = math.ceil(phase.tokens / per_step)
            self.phases.append(
                Phase(
                    name=phase.name,
                    first_step=step,
                    steps=steps,
                    first_token=token,
                    max_seq_len=values["max_seq_len"],
                    global_batch_size=values["global_batch_size"],
                    peak_lr=values["lr"],
                    warmup=phase.warmup,
                    schedule=SCHEDULES.build(phase.schedule),
                    theta_global=theta[0],
                    theta_local=theta[1],
                    masking=values["masking"],
                    streams=values["streams"],
                    long_documents=values["long_documents"],
                )
            )
            step, token = step + steps, token + steps * per_step
        self.total_steps, self.total_tokens = step, token

    def at(self, step: int) -> Phase:
        """The phase that step (0-based) belongs to; the last one for steps behind the end."""
        return next((phase for phase in self.phases if step < phase.end_step), self.phases[-1])

    def tokens_before(self, step: int) -> int:
        """Tokens (slots) of all steps before this one."""
        phase = self.at(step)
        return phase.first_token + (step - phase.first_step) * phase.tokens_per_step

    def is_milestone(self, step: int) -> bool:
        """True when `step` steps complete a phase."""
        return any(step == phase.end_step for phase in self.phases)

    def crosses(self, step: int, interval: int | None) -> bool:
        """True when the step that ends at `step` steps passes a multiple of `interval` tokens."""
        if interval is None or step == 0:
            return False
        return self.tokens_before(step) // interval > self.tokens_before(step - 1) // interval

    def loader_config(self, config: RunConfig) -> LoaderConfig:
        """What the loader needs to know of the run."""
        phases = [
            LoaderPhase(
                steps=phase.steps,
                global_batch_size=phase.global_batch_size,
                max_seq_len=phase.max_seq_len,
                masking=phase.masking,
                streams=phase.streams,
                long_documents=phase.long_documents,
            )
            for phase in self.phases
        ]
        return LoaderConfig(seed=config.seed, data=config.data, phases=phases)
