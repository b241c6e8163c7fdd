"""The config of a run that goes on, as it was begun."""

import logging

import ranks
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from recipe.schedules import falls
from training.folder import RunFolder

log = logging.getLogger(__name__)


def as_begun(config: RunConfig, folder: RunFolder) -> RunConfig:
    """`config` for a run that goes on in `folder`, where it leaves open what the run decided at its start: the order
    of data.streams, which says nothing in YAML but numbers the streams; the number of lanes, where batches of phases to
    come would give another; where schedules fall from; and `from` in other words for the same. A new run's is as it
    is."""
    if not (folder.path / "config.yaml").exists():
        return config
    before = folder.recorded_config()
    names = [name for name in before.data.streams if name in config.data.streams]
    names += [name for name in config.data.streams if name not in names]
    data = config.data.model_copy(update={"streams": {name: config.data.streams[name] for name in names}})
    if data.lanes is None and config.lanes != before.lanes:
        same = data.model_copy(update={"lanes": before.lanes})
        data = same if _divides(before.lanes, config.model_copy(update={"data": same})) else data
    phases = list(config.phases)
    for number, (phase, was) in enumerate(zip(config.phases, before.phases, strict=False)):
        here, there = phase.schedule, was.schedule
        if here.name == there.name and falls(here.name) and "falls_from" not in here.model_fields_set:
            if here.falls_from != there.falls_from and ranks.rank() == 0:
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


def _divides(lanes: int, config: RunConfig) -> bool:
    """Whether every batch of a run has the same number of rows from each lane."""
    return all(segment.rows % lanes == 0 for phase in PhasePlan(config).phases for segment in phase.segments)
