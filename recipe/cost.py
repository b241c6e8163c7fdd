"""What a run costs, by its config alone."""

from collections.abc import Iterator
from typing import Any

from numpy.typing import ArrayLike

from flexbert.accounting import batch_flops
from flexbert.config import FlexBertConfig
from recipe.config import RunConfig
from recipe.phases import Phase, PhasePlan
from recipe.slots import OBJECTIVES


def run_flops(config: RunConfig) -> float:
    """Floating-point operations of all its steps (flexbert.accounting.batch_flops), in rows that are full."""
    return sum(phase_flops_per_token(config, phase) * phase.tokens for phase in PhasePlan(config).phases)


def phase_flops_per_token(config: RunConfig, phase: Phase) -> float:
    """Of forward and backward in a phase, over rows of one document each."""
    length = phase.max_seq_len
    return phase_flops(config, phase, [length], [phase.masking.mean_rate * length]) / length


def phase_flops(config: RunConfig, phase: Phase, lengths: ArrayLike, masked: ArrayLike) -> float:
    """Of forward and backward in a phase, over packed sequences of these lengths, of each of which so many tokens are
    masked."""
    own = getattr(OBJECTIVES.entries[phase.objective.name], "batch_flops", None)
    if own is not None:
        return own(phase.objective, config.model, lengths, masked)
    return batch_flops(config.model, lengths, masked, phase.is_causal)


def other_models(config: RunConfig, plan: PhasePlan) -> list[FlexBertConfig]:
    """What objectives train beside the model, and every checkpoint holds."""
    return _of_objectives(config, plan, "models")


def frozen_models(config: RunConfig, plan: PhasePlan) -> list[FlexBertConfig]:
    """What objectives read beside the model, and do not train: no checkpoint holds it."""
    return _of_objectives(config, plan, "frozen_models")


def parameters_beside(config: RunConfig, plan: PhasePlan) -> int:
    """What is trained beside the model, in `other_models` and besides: in every checkpoint."""
    return sum(_each(config, plan, "parameters_beside"))


def parameters_exported(config: RunConfig, phase: Phase) -> int:
    """What is written beside each export of a phase."""
    told = getattr(OBJECTIVES.entries[phase.objective.name], "parameters_exported", None)
    return 0 if told is None else told(phase.objective, config.model)


def _of_objectives(config: RunConfig, plan: PhasePlan, name: str) -> list[FlexBertConfig]:
    return [model for models in _each(config, plan, name) for model in models]


def _each(config: RunConfig, plan: PhasePlan, name: str) -> Iterator[Any]:
    """What the static method of this name says, of each objective that has one, once: its phases share what it has."""
    first = {phase.objective.name: phase.objective for phase in reversed(plan.phases)}
    for key, objective in first.items():
        if (told := getattr(OBJECTIVES.entries[key], name, None)) is not None:
            yield told(objective, config.model)
