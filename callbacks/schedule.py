"""Sets what a step needs before it runs: learning rate, RoPE theta and the seed of the global generator."""

from collections.abc import Callable

import torch
from composer.core import Callback, State
from composer.loggers import Logger

from flexbert import FlexBertForMaskedLM
from recipe.phases import Phase, PhasePlan
from recipe.schedules import set_learning_rate


class StepSchedule(Callback):
    """All three are functions of the step number, so a resumed run needs no scheduler or RNG state.

    | logged | unit | event |
    |---|---|---|
    | nothing; `lr` is in the optimizer's groups | | FIT_START, BATCH_START |
    """

    def __init__(
        self,
        plan: PhasePlan,
        model: FlexBertForMaskedLM,
        generator_seed: Callable[[int], int],
    ) -> None:
        """generator_seed: of torch's global one, in a step on this rank."""
        self.plan, self.model, self.generator_seed = plan, model, generator_seed
        self._phase: Phase | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        self._phase = None  # after a rollback the model has the theta of the step before, which may be another phase's

    def batch_start(self, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value
        phase = self.plan.at(step)
        if phase is not self._phase:
            self.model.set_rope_theta(phase.theta_global, phase.theta_local)
            self._phase = phase
        set_learning_rate(state.optimizers[0], phase.lr(step), phase.peak_lr)
        # Not torch.manual_seed: before CUDA is up it formats the call stack for later, a millisecond each time.
        seed = self.generator_seed(step)
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
