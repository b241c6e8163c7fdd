"""The objectives of a run's phases: built, with what they train beside the model, and told of its steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch import nn

from flexbert import FlexBertForMaskedLM
from flexbert.dropout import name_sites
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig
from recipe.cost import parameters_beside
from recipe.phases import Phase, PhasePlan
from recipe.slots import OBJECTIVES
from training.objectives.base import Objective

PARTS = "parts."
"""How the names of parameters begin that belong to an objective, and not to the model."""


def build_objectives(config: RunConfig, plan: PhasePlan) -> list[Objective]:
    """Of each phase; phases that say the same share one. Raises ConfigError, starting with the key, for one that
    refuses its arguments or the files that they name, or has weights of its own."""
    built: dict[str, Any] = {}
    for phase in plan.phases:
        key = phase.objective.model_dump_json()
        if key in built:
            continue
        if (check := getattr(OBJECTIVES.entries[phase.objective.name], "check_files", None)) is not None:
            check(phase.objective, config)
        try:
            objective: Any = OBJECTIVES.build(phase.objective, plan=plan)
        except ValueError as error:
            raise ConfigError(f"objective: {error}") from None
        if isinstance(objective, torch.nn.Module) and list(objective.parameters()):
            raise ConfigError(
                f"objective: {phase.objective.name!r} has parameters of its own, which no optimizer would train: give "
                "them to a head of the model"
            )
        built[key] = objective
    return [cast(Objective, built[phase.objective.model_dump_json()]) for phase in plan.phases]


def has_parts(config: RunConfig) -> bool:
    """Whether an objective trains more than the model."""
    return parameters_beside(config, PhasePlan(config)) > 0


def idle_parameters(model: nn.Module, objective: Objective) -> Iterator[nn.Parameter]:
    """Those that an objective does not train, in a run where another phase's does. Tied ones are the model's."""
    if not hasattr(model, PARTS.removesuffix(".")):
        return
    idle, trains = getattr(objective, "idle", ()), getattr(objective, "trains", ())
    for name, parameter in model.named_parameters():
        if name.startswith(PARTS):
            if not name.removeprefix(PARTS).startswith(trains):
                yield parameter
        elif name.startswith(idle):
            yield parameter


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Within, the model is without what objectives train beside it."""
    key = PARTS.removesuffix(".")
    parts = model._modules.pop(key, None)
    try:
        yield
    finally:
        if parts is not None:
            model.add_module(key, parts)


class Objectives(Callback):
    """One for each phase, in `each`. What they train beside the model is in the module `model.parts`, so that it is
    optimised, saved and averaged over ranks as the model is.

    | logged | unit | event |
    |---|---|---|
    | nothing | | BATCH_START, BEFORE_TRAIN_BATCH, AFTER_TRAIN_BATCH, BATCH_END |
    """

    def __init__(self, config: RunConfig, plan: PhasePlan, model: FlexBertForMaskedLM) -> None:
        """Before the model goes to its device. Raises ConfigError, as build_objectives."""
        self.plan, self.model = plan, model
        self.each = build_objectives(config, plan)
        self._begun: Phase | None = None
        parts: dict[str, nn.Module] = {}
        for objective in {id(each): each for each in self.each}.values():
            if (made := getattr(objective, "build_parts", None)) is not None:
                parts = made(model, config) | parts  # those of one name share what the first has made
        if parts:
            model.add_module(PARTS.removesuffix("."), nn.ModuleDict(parts))
            name_sites(model)

    def _of(self, state: State) -> Objective:
        return self.each[self.plan.phases.index(self.plan.at(state.timestamp.batch.value))]

    def resumed(self, step: int) -> None:
        """Before anything is trained or measured: the model has the weights after so many steps, of this process or an
        earlier one. It becomes what that step has left, and at step 0 what the first one will begin with."""
        phase = self.plan.at(max(step - 1, 0))
        self.model.set_rope_theta(phase.theta_global, phase.theta_local)
        self._begun = None
        objective = self.each[self.plan.phases.index(phase)]
        if step == 0:
            self._begin(0)
        elif (tell := getattr(objective, "set_theta", None)) is not None:
            tell(self.model, phase)

    def batch_start(self, state: State, logger: Logger) -> None:
        self._begin(state.timestamp.batch.value)

    def _begin(self, step: int) -> None:
        phase = self.plan.at(step)
        if phase is self._begun:
            return
        self._begun = phase
        if (begin := getattr(self.each[self.plan.phases.index(phase)], "begin", None)) is not None:
            before = self.plan.at(step - 1).objective.name if step else None
            begin(self.model, phase, step == phase.first_step and before != phase.objective.name)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        if (tell := getattr(self._of(state), "before_step", None)) is not None:
            tell(self.model)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """What the phase does not train has gradients of zeros, for DDP; an optimizer would make it decay."""
        for parameter in idle_parameters(self.model, self._of(state)):
            parameter.grad = None

    def batch_end(self, state: State, logger: Logger) -> None:
        # The clock has been put on by one step.
        objective = self.each[self.plan.phases.index(self.plan.at(state.timestamp.batch.value - 1))]
        if (tell := getattr(objective, "after_step", None)) is not None:
            tell(self.model)
