"""The config that a run has recorded: what older versions left unsaid, and what a run that goes on takes over of it."""

import logging
from typing import TYPE_CHECKING, Any

from composer.utils import dist

from training.schedules import falls

if TYPE_CHECKING:
    from training.config import RunConfig
    from training.folder import RunFolder

log = logging.getLogger(__name__)


def as_recorded(node: dict[str, Any]) -> dict[str, Any]:
    """The node of a config.yaml, saying what those written up to commit 38751cb did not: a falling schedule fell from
    the phase's start on, beside the warmup; and `data: continue` stood beside `weights_only`, which it never meant."""
    if "wandb" in node:  # a section of its own up to the same commit
        wandb = node.pop("wandb")
        node["loggers"] = ["tensorboard", *([{"name": "wandb", **wandb}] if wandb else [])]
    phases, origin = node.get("phases"), node.get("from")
    for phase in phases if isinstance(phases, list) else ():
        schedule = phase.get("schedule") if isinstance(phase, dict) else None
        if isinstance(schedule, dict) and falls(str(schedule.get("name"))) and phase.get("warmup"):
            schedule.setdefault("falls_from", "start")
    if isinstance(origin, dict) and origin.get("weights_only"):
        origin.pop("data", None)
    return node


def as_begun(config: "RunConfig", folder: "RunFolder") -> "RunConfig":
    """`config` for a run that goes on in `folder`, where it leaves open what the run decided at its start: the order
    of data.streams, which says nothing in YAML but numbers the streams; where schedules fall from; and `from` in other
    words for the same. A new run's is as it is."""
    if not (folder.path / "config.yaml").exists():
        return config
    before = folder.recorded_config()
    names = [name for name in before.data.streams if name in config.data.streams]
    names += [name for name in config.data.streams if name not in names]
    data = config.data.model_copy(update={"streams": {name: config.data.streams[name] for name in names}})
    phases = list(config.phases)
    for number, (phase, was) in enumerate(zip(config.phases, before.phases, strict=False)):
        here, there = phase.schedule, was.schedule
        if here.name == there.name and falls(here.name) and "falls_from" not in here.model_fields_set:
            if here.falls_from != there.falls_from and dist.get_global_rank() == 0:
                log.warning(
                    "phases.%d.schedule: falls from the phase's %s, as this run was begun: falls_from=%s says so",
                    number,
                    there.falls_from,
                    there.falls_from,
                )
            schedule = here.model_copy(update={"falls_from": there.falls_from})
            phases[number] = phase.model_copy(update={"schedule": schedule})
    origin = config.origin
    if origin is not None and before.origin is not None and origin.meaning == before.origin.meaning:
        origin = origin.model_copy(update={key: getattr(before.origin, key) for key in ("weights_only", "data")})
    return config.model_copy(update={"data": data, "phases": phases, "origin": origin})
