"""Phases resolved to steps: everything about step k that the config decides, without looking at data or state."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Any

from data.feed.lanes import LongDocuments
from data.feed.loader import LoaderConfig, LoaderPhase
from data.feed.masking import MaskingConfig, is_causal
from data.feed.mixture import StreamShare
from flexbert_core.schema import Component, ConfigError
from recipe.batch_sizes import runs_of_steps
from recipe.config import RunConfig
from recipe.objectives import own_masking
from recipe.schedules import SCHEDULES, Schedule


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of a phase with the same number of rows. Tokens are slots: rows x max_seq_len a step."""

    first_step: int
    steps: int
    first_token: int
    rows: int
    tokens_per_step: int


@dataclass(frozen=True)
class Phase:
    """A phase with nothing left to inherit. Tokens are slots: rows x max_seq_len a step."""

    name: str
    segments: tuple[Segment, ...]
    max_seq_len: int
    global_batch_size: int
    peak_lr: float
    warmup: int
    schedule: Schedule
    theta_global: float | None
    theta_local: float | None
    masking: MaskingConfig
    objective: Component
    streams: dict[str, StreamShare] | None
    long_documents: LongDocuments | None

    @property
    def is_causal(self) -> bool:
        """Whether tokens see only what stands before them."""
        return is_causal(self.masking)

    @property
    def first_step(self) -> int:
        return self.segments[0].first_step

    @property
    def first_token(self) -> int:
        return self.segments[0].first_token

    @property
    def end_step(self) -> int:
        return self.segments[-1].first_step + self.segments[-1].steps

    @property
    def end_token(self) -> int:
        return self.tokens_before(self.end_step)

    @property
    def steps(self) -> int:
        return self.end_step - self.first_step

    @property
    def tokens(self) -> int:
        return self.end_token - self.first_token

    def segment(self, step: int) -> Segment:
        """The segment of a step of this phase; the last one for steps behind its end."""
        return self.segments[bisect_right(self.segments, step, key=lambda segment: segment.first_step) - 1]

    def tokens_before(self, step: int) -> int:
        """Tokens of the run before a step of this phase."""
        segment = self.segment(step)
        return segment.first_token + (step - segment.first_step) * segment.tokens_per_step

    def lr(self, step: int) -> float:
        """Learning rate of a step of this phase. Warmup: linear, reaching the peak with the step that completes it."""
        done = self.tokens_before(step) - self.first_token
        rise = min(1.0, (done + self.segment(step).tokens_per_step) / self.warmup) if self.warmup else 1.0
        return self.peak_lr * rise * self.schedule(done / self.tokens, self.warmup / self.tokens)


class PhasePlan:
    """The phases of a run in order. Raises ConfigError where trainer.skip_steps is behind the end."""

    def __init__(self, config: RunConfig) -> None:
        self.phases: list[Phase] = []
        values: dict[str, Any] = {"max_seq_len": 0, "global_batch_size": 0, "lr": 0.0, "masking": config.masking}
        values |= {"streams": None, "long_documents": None, "objective": config.objective}
        shortest = {name: stream.min_length or 0 for name, stream in config.data.streams.items()}
        theta: list[float | None] = [None, None]
        step = token = 0
        for phase in config.phases:
            values |= {key: value for key in values if (value := getattr(phase, key)) is not None}
            if phase.streams is not None:
                given = phase.streams.items()
                shortest |= {name: share.min_length for name, share in given if share.min_length is not None}
                values["streams"] = {
                    name: share.model_copy(update={"min_length": shortest[name]}) for name, share in given
                }
            theta = [phase.rope_theta.global_layers or theta[0], phase.rope_theta.local_layers or theta[1]]
            segments: list[Segment] = []
            for rows, steps in runs_of_steps(
                phase.batch_size_warmup,
                (phase.batch_size_warmup and phase.batch_size_warmup.step) or config.lanes,
                values["global_batch_size"],
                values["max_seq_len"],
                phase.tokens,
            ):
                segments.append(Segment(step, steps, token, rows, rows * values["max_seq_len"]))
                step, token = step + steps, token + steps * rows * values["max_seq_len"]
            self.phases.append(
                Phase(
                    name=phase.name,
                    segments=tuple(segments),
                    max_seq_len=values["max_seq_len"],
                    global_batch_size=values["global_batch_size"],
                    peak_lr=values["lr"],
                    warmup=phase.warmup,
                    schedule=SCHEDULES.build(phase.schedule),
                    theta_global=theta[0],
                    theta_local=theta[1],
                    masking=own_masking(values["objective"]) or values["masking"],
                    objective=values["objective"],
                    streams=values["streams"],
                    long_documents=values["long_documents"],
                )
            )
            if own_masking(values["objective"]) is None:
                values["masking"] = values["masking"].settled()
        self.total_steps, self.total_tokens = step, token
        for steps in config.trainer.skip_steps:
            if int(steps.split("-")[-1]) > step:
                raise ConfigError(f"trainer.skip_steps: {steps}: the run ends with step {step}")

    def at(self, step: int) -> Phase:
        """The phase that step (0-based) belongs to; the last one for steps behind the end."""
        return next((phase for phase in self.phases if step < phase.end_step), self.phases[-1])

    def lr(self, step: int) -> float:
        """Learning rate of a step (0-based); groups of the optimizer may have a factor of their own."""
        return self.at(step).lr(step)

    def tokens_before(self, step: int) -> int:
        """Tokens (slots) of all steps before this one."""
        return self.at(step).tokens_before(step)

    def facts(self, step: int) -> dict[str, Any]:
        """Where a run stands after `step` steps: tokens, and of its last step phase, max_seq_len, global_batch_size."""
        last = step - 1 if step else 0
        phase = self.at(last)
        return {
            "tokens": self.tokens_before(step),
            "phase": phase.name,
            "max_seq_len": phase.max_seq_len,
            "global_batch_size": self.rows_at(last),
        }

    def step_of(self, tokens: int) -> int | None:
        """The number of steps that make up so many tokens (slots); None when no number does."""
        step = bisect_left(range(self.total_steps + 1), tokens, key=self.tokens_before)
        return step if step <= self.total_steps and self.tokens_before(step) == tokens else None

    def step_at(self, tokens: int) -> int:
        """The fewest steps that make up at least so many tokens (slots); all of the run's where it has fewer."""
        steps = bisect_left(range(self.total_steps + 1), tokens, key=self.tokens_before)
        return min(steps, self.total_steps)

    def rows_at(self, step: int) -> int:
        """Rows of the global batch of a step."""
        return self.at(step).segment(step).rows

    def is_milestone(self, step: int) -> bool:
        """True when `step` steps complete a phase."""
        return any(step == phase.end_step for phase in self.phases)

    def crosses(self, step: int, interval: int | None) -> bool:
        """True when the step that ends at `step` steps passes a multiple of `interval` tokens."""
        if interval is None or step == 0:
            return False
        return self.tokens_before(step) // interval > self.tokens_before(step - 1) // interval

    def is_permanent(self, step: int, keep_every: int | None) -> bool:
        """Whether the checkpoint after `step` steps is kept for ever."""
        return self.is_milestone(step) or self.crosses(step, keep_every)

    def is_exported(self, step: int, keep_every: int | None, permanent: bool) -> bool:
        """Whether the weights after `step` steps are exported. permanent: not at milestones alone, but at step 0 and
        wherever the checkpoint is kept for ever."""
        return self.is_milestone(step) or (permanent and (step == 0 or self.is_permanent(step, keep_every)))

    def checkpoints(self, phase: Phase, interval: int | None) -> int:
        """Checkpoints that a phase's steps write: where they cross a multiple of `interval` tokens, and at its end."""
        count = 0
        if interval is not None:
            for segment in phase.segments:
                end = segment.first_token + segment.steps * segment.tokens_per_step
                crossed = end // interval - segment.first_token // interval
                count += min(crossed, segment.steps)  # a step writes one, however many multiples it crosses
        return count + (not self.crosses(phase.end_step, interval))

    def loader_config(self, config: RunConfig) -> LoaderConfig:
        """What the loader needs to know of the run."""
        phases = [
            LoaderPhase(
                number=number,
                steps=segment.steps,
                global_batch_size=segment.rows,
                max_seq_len=phase.max_seq_len,
                masking=phase.masking,
                streams=phase.streams,
                long_documents=phase.long_documents,
            )
            for number, phase in enumerate(self.phases)
            for segment in phase.segments
        ]
        return LoaderConfig(
            seed=config.seed, data=config.data.model_copy(update={"lanes": config.lanes}), phases=phases
        )
