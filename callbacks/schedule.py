"""Sets what a step needs before it runs: learning rate, RoPE theta and the seed of the global generator."""

from collections.abc import Callable
from typing import Protocol

import torch
from composer.core import Callback, State
from composer.loggers import Logger


class SchedulablePhase(Protocol):
    """What this callback must know of a phase."""

    @property
    def peak_lr(self) -> float: ...
    @property
    def theta_global(self) -> float | None: ...
    @property
    def theta_local(self) -> float | None: ...
    def lr(self, step: int) -> float: ...


class StepSchedule(Callback):
    """All three are functions of the step number, so a resumed run needs no scheduler or RNG state.

    | logged | unit | event |
    |---|---|---|
    | nothing; `lr` is in the optimizer's groups | | BATCH_START |
    """

    def __init__(
        self,
        phase_at: Callable[[int], SchedulablePhase],
        set_rope_theta: Callable[[float | None, float | None], None],
        generator_seed: Callable[[int], int],
    ) -> None:
        """generator_seed: of torch's global one, in a step on this rank."""
        self.phase_at, self.set_rope_theta, self.generator_seed = phase_at, set_rope_theta, generator_seed
        self._phase: SchedulablePhase | None = None

    def batch_start(self, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value
        phase = self.phase_at(step)
        if phase is not self._phase:
            self.set_rope_theta(phase.theta_global, phase.theta_local)
            self._phase = phase
        for group in state.optimizers[0].param_groups:
            group["lr"] = phase.lr(step)
            if group.get("max_lr") is not None:  # optimi's decoupled decay is relative to the phase's peak
                group["max_lr"] = phase.peak_lr
        # Not torch.manual_seed: before CUDA is up it formats the call stack for later, a millisecond each time.
        seed = self.generator_seed(step)
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
