"""`main.py decay RUN --tokens N`: a branch that lets the learning rate of a run fall, from one of its checkpoints."""

import glob
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ranks
from data.feed.masking import DEFAULT, MASKINGS
from data.feed.mixture import StreamShare, rule_of
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig, read_recorded_config
from recipe.objectives import own_masking
from recipe.phases import PhasePlan
from recipe.tokens import TokensConfig
from training.checkpoints.files import list_checkpoints, tokens_of
from training.folder import RunFolder

log = logging.getLogger(__name__)


def decay_config(
    run: Path,
    tokens: int,
    start: int | None,
    name: str | None,
    schedule: str,
    overrides: Sequence[str],
    world_size: int,
) -> RunConfig:
    """The branch's config: everything as in the run, one phase `decay` of so many tokens (slots) whose lr falls from
    what it is at the checkpoint.

    start: tokens of the checkpoint; None: the newest, or that of an unfinished branch of this length, which goes on.
    name: of the branch; None: RUN-decay-TOKENS-from-START. schedule: how lr falls. overrides: key=value, over all.
    Raises ConfigError for a run without such a checkpoint; and with several processes and no start, since each could
    see another newest checkpoint of a run that trains.
    """
    run = run.absolute()
    folder = RunFolder(run)
    recorded = folder.recorded_config()
    plan = PhasePlan(recorded)
    there = [tokens_of(path) for path in list_checkpoints(folder.checkpoints)]
    there = [each for each in there if each]
    if not there:
        raise ConfigError(f"{run}: has no checkpoint yet to decay from: wait for one, or lower checkpoint.interval")
    if start is None:
        if world_size > 1:
            raise ConfigError(f"--from: is needed with {world_size} processes: the newest is --from {there[-1]}")
        start = _unfinished(run, tokens) if name is None else _origin_of(run.parent / name)
        start = there[-1] if start is None else start
    elif start not in there and _origin_of(run.parent / (name or _name(run, tokens, start))) != start:
        raise ConfigError(f"--from: {run} has no checkpoint at {start} tokens; it has {', '.join(map(str, there))}")
    step = plan.step_at(start)
    node: dict[str, Any] = {
        "name": name or _name(run, tokens, start),
        "runs": str(run.parent),  # where the run lies now, which may have been moved
        "from": {
            "checkpoint": str(folder.checkpoints / f"tokens-{start}"),
            "weights_only": False,
            "data": "continue",
            "fresh_head": False,
        },
        "tokens": TokensConfig().model_dump(mode="json"),  # new ones are the run's already
        "phases": [_phase(recorded, plan, step, tokens, schedule)],
        "publish": None,  # its revisions are named by tokens, as the run's own are
        "trainer": {"skip_steps": []},
        "data": {"lanes": recorded.lanes},  # of all its phases
        **_measured(recorded, plan),
    }
    last = max(step - 1, 0)
    if own_masking(plan.at(last).objective) is not None:  # no phase reads the run's any more
        node["masking"] = MASKINGS.parse(DEFAULT).model_dump(mode="json")
    share = plan.lr(last) / plan.at(last).peak_lr
    if share == 1 or not getattr(recorded.optimizer, "decoupled", False):
        return read_recorded_config(run / "config.yaml", overrides, node)
    node["optimizer"] = _scaled(recorded.optimizer, share)
    config = read_recorded_config(run / "config.yaml", overrides, node)
    decay = getattr(config.optimizer, "weight_decay", None)
    if decay == node["optimizer"]["weight_decay"] and ranks.rank() == 0:
        log.warning(
            "optimizer.weight_decay: %.6g in place of %g, and groups' likewise: it counts at the peak learning rate, "
            "which is here %.4g of the run's, and weights decay on as they did",
            decay,
            recorded.optimizer.weight_decay,
            share,
        )
    return config


def _measured(recorded: RunConfig, plan: PhasePlan) -> dict[str, Any]:
    """What keeps evaluations on the rows of the run, whose first phase may have had shorter ones."""
    length = {"max_seq_len": plan.phases[0].max_seq_len}
    others = {
        str(number): length
        for number, each in enumerate(recorded.evaluations)
        if getattr(each, "max_seq_len", length) is None
    }
    own = {"evaluation": length} if recorded.evaluation.max_seq_len is None else {}
    return {**own, **({"evaluations": others} if others else {})}


def _scaled(optimizer: Any, share: float) -> dict[str, Any]:
    """The keys of a decay relative to the peak learning rate, for a phase that begins at this share of it."""
    groups = [
        {**group.model_dump(), "weight_decay": None if group.weight_decay is None else group.weight_decay * share}
        for group in getattr(optimizer, "groups", ())
    ]
    return {"weight_decay": optimizer.weight_decay * share, **({"groups": groups} if groups else {})}


def _phase(recorded: RunConfig, plan: PhasePlan, step: int, tokens: int, schedule: str) -> dict[str, Any]:
    """As the run trained in the last of `step` steps, with nothing to inherit."""
    last = max(step - 1, 0)
    phase = plan.at(last)
    progress = (plan.tokens_before(last) - phase.first_token) / phase.tokens
    node: dict[str, Any] = {
        "name": "decay",
        "tokens": tokens,
        "max_seq_len": phase.max_seq_len,
        "global_batch_size": plan.rows_at(last),
        "lr": plan.lr(last),
        "schedule": {"name": schedule},
        "rope_theta": {"global_layers": phase.theta_global, "local_layers": phase.theta_local},
        "objective": phase.objective.model_dump(mode="json"),
        "long_documents": phase.long_documents,
    }
    if own_masking(phase.objective) is None:
        node["masking"] = phase.masking.at(progress).model_dump(mode="json")
    streams: Mapping[str, StreamShare] | None = phase.streams
    if streams is None and rule_of(recorded.data.streams) == "tokens":
        streams = recorded.data.streams
    if streams is not None:
        # Tokens of streams make up the budget of their own phase: here they are weights.
        node["streams"] = {
            name: {
                "weight": share.tokens if share.tokens is not None else share.weight,
                "repeat": share.repeat,
                "min_length": share.min_length,
            }
            for name, share in streams.items()
        }
    return node


def _name(run: Path, tokens: int, start: int) -> str:
    return f"{run.name}-decay-{tokens}-from-{start}"


def _unfinished(run: Path, tokens: int) -> int | None:
    """Where the newest branch of this length that has begun and has not ended started."""
    prefix = f"{run.name}-decay-{tokens}-from-"
    begun = sorted(
        int(text)
        for path in run.parent.glob(f"{glob.escape(prefix)}*")
        if (text := path.name.removeprefix(prefix)).isdecimal()
        and (path / "config.yaml").exists()
        and not (path / "summary.json").exists()
    )
    return begun[-1] if begun else None


def _origin_of(folder: Path) -> int | None:
    """Tokens of the checkpoint that a branch started from; None where it has not begun, or from no checkpoint."""
    try:
        if not (folder / "config.yaml").exists():
            return None
    except OSError:  # a name that no folder can have: the schema says so
        return None
    origin = read_recorded_config(folder / "config.yaml").origin
    found = None if origin is None else re.fullmatch(r"tokens-([0-9]+)", Path(origin.checkpoint).name)
    return None if found is None else int(found[1])
