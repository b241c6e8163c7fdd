"""Keys of a run file that cannot have an effect: refused where the run would not be what was asked for, else said."""

import logging
import os

from flexbert.hf.convert import check_exportable
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from training.parts import part_faults
from training.trial import shape_faults

log = logging.getLogger(__name__)


def check_effects(config: RunConfig, place: object) -> None:
    """Raise ConfigError, a line for each, `PLACE: key: what is wrong: fix`.

    What runs of older versions may have been begun with is only warned of, so that they can go on.
    """
    faults = _faults(config) or shape_faults(config)
    if faults:
        raise ConfigError("\n".join(f"{place}: {fault}" for fault in faults))
    for line in _without_effect(config):
        log.warning("%s", line)


def _faults(config: RunConfig) -> list[str]:
    faults = part_faults(config)
    for number, phase in enumerate(config.phases):
        given = [key for key, theta in phase.rope_theta if theta is not None]
        if given and not hasattr(config.model.position, "global_theta"):
            faults.append(
                f"phases[{number}].rope_theta.{given[0]}: model.position is {config.model.position.name!r}, which has "
                "no theta: remove it, or use rope"
            )
    if config.checkpoint.keep_best and config.evaluation.interval is None:
        faults.append(
            "checkpoint.keep_best: without evaluation.interval only milestones are evaluated, which are kept anyway: "
            "set evaluation.interval"
        )
    return faults


def _without_effect(config: RunConfig) -> list[str]:
    lines = []
    layers = [config.model.layer(index).attention for index in range(config.model.num_hidden_layers)]
    windows = [
        index % every
        for index, attention in enumerate(layers)
        if (every := getattr(attention, "global_attn_every_n_layers", None)) is not None
    ]
    if len(windows) == len(layers) and not any(windows):
        for number, phase in enumerate(config.phases):
            if phase.rope_theta.local_layers is not None:
                lines.append(f"phases[{number}].rope_theta.local_layers: no layer has a window, so it changes nothing")
    if config.ema is not None and config.ema.every is not None:
        tokens = PhasePlan(config).total_tokens
        if config.ema.every > tokens:
            lines.append(
                f"ema.every: {config.ema.every} tokens are more than the run's {tokens}, so there will be no average"
            )
    try:
        check_exportable(config.model)
    except ConfigError as error:
        lines.append(f"the run will have checkpoints, and no exports: model.{error}")
    return lines


def ranks() -> int:
    """The number of processes that a launcher says there are (WORLD_SIZE); 1 without a launcher.

    Raises ConfigError when its variables contradict one another: a run would wait for processes that never come.
    """
    world_size = _variable("WORLD_SIZE", 1, 1)
    return 1 if world_size is None else world_size


def check_launch() -> None:
    """Raise ConfigError when the variables of a launcher do not name this process's place in it."""
    world_size, rank = ranks(), _variable("RANK", 0, None)
    if rank is None and world_size > 1:
        raise ConfigError(
            f"WORLD_SIZE={world_size} in the environment, but no RANK: start with `composer -n {world_size} main.py "
            "...`, or unset WORLD_SIZE"
        )
    if rank is not None and rank >= world_size:
        raise ConfigError(
            f"RANK={rank} in the environment is not under WORLD_SIZE={world_size}: unset both, or correct them"
        )
    _variable("LOCAL_RANK", 0, None)


def _variable(name: str, least: int, default: int | None) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return default
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name}={text} in the environment: expected a whole number, {least} or more: unset it")
    return int(text)
