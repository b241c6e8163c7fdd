"""`equal` of a sweep file: what is changed in an arm so that it gets as much as the baseline."""

from collections.abc import Mapping
from typing import Any

from flexbert.accounting import count_parameters
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig
from recipe.cost import run_flops
from recipe.phases import PhasePlan
from sweeps.file import Equal

_STEP = 8  # intermediate_size stays a multiple of it, as products on GPUs like it
_PARAMETERS = 0.01  # as near as parameters have to come, as a share


def adjusted(
    equal: Equal,
    arm: RunConfig,
    baseline: RunConfig,
    slots_per_second: Mapping[str, float],
    arm_name: str,
    baseline_name: str,
) -> dict[str, Any]:
    """Config paths and their values; empty where nothing has to change. Raises ConfigError where it cannot be done."""
    if equal == "parameters":
        return _parameters(arm, baseline)
    if equal == "tokens":
        share = PhasePlan(baseline).total_tokens / PhasePlan(arm).total_tokens
    elif equal == "flops":
        share = run_flops(baseline) / run_flops(arm)
    else:
        for name in (arm_name, baseline_name):
            if name not in slots_per_second:
                raise ConfigError(f"hours: slots_per_second has no {name!r}: take that of metrics.jsonl of a short run")
        tokens = PhasePlan(baseline).total_tokens / PhasePlan(arm).total_tokens
        share = tokens * slots_per_second[arm_name] / slots_per_second[baseline_name]
    return _budgets(arm, share)


def _budgets(arm: RunConfig, share: float) -> dict[str, Any]:
    """All phases so much longer; what is given in tokens of a phase grows with it."""
    found: dict[str, Any] = {}
    for number, phase in enumerate(arm.phases):
        for key, value in (("tokens", phase.tokens), ("warmup", phase.warmup)):
            if value and round(value * share) != value:
                found[f"phases.{number}.{key}"] = round(value * share)
        if phase.batch_size_warmup is not None and share != 1:
            found[f"phases.{number}.batch_size_warmup.tokens"] = round(phase.batch_size_warmup.tokens * share)
    return found


def _parameters(arm: RunConfig, baseline: RunConfig) -> dict[str, Any]:
    wanted, size = count_parameters(baseline.model), arm.model.intermediate_size

    def count(width: int) -> int:
        return count_parameters(arm.model.model_copy(update={"intermediate_size": width}))

    if abs(count(size) - wanted) <= _PARAMETERS * wanted / 10:
        return {}
    slope = (count(size + _STEP) - count(size)) / _STEP
    width = _STEP * max(1, round((size + (wanted - count(size)) / slope) / _STEP)) if slope else size
    if abs(count(width) - wanted) > _PARAMETERS * wanted:
        raise ConfigError(
            f"parameters: intermediate_size {width} gives {count(width):,}, the baseline has {wanted:,}: set the arm's "
            "sizes by hand"
        )
    return {} if width == size else {"model.intermediate_size": width}
