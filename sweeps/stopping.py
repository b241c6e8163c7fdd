"""`stop` of a sweep file: successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943) of whole arms.

Every arm is trained with every seed up to a rung, a share of its own budget, and paused there. Then arms are ranked by
their held-out loss, the mean over seeds, and the best go on. An arm is stopped with all of its seeds, since one that
lacks some could be compared with nothing. The baseline always goes on and takes no place. Nothing is stopped inside a
warmup, where losses say little about the end.

Decisions are kept in SWEEP/stops.json and stay. An arm that comes later, or failed before, is ranked among all that
ever came to the rung (as in ASHA, arXiv 1810.05934), over the seeds that all of them have.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from callbacks.step_log import read_lines
from flexbert_core.durable import write_file
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from sweeps.file import Stop
from sweeps.results import Judged
from training.checkpoints.files import list_checkpoints, tokens_of
from training.folder import RunFolder

FILE = "stops.json"


def rung_tokens(stop: Stop, config: RunConfig) -> list[int]:
    """Of each rung the tokens (slots) after which a run pauses: whole steps, at least the rung's share."""
    plan = PhasePlan(config)
    return [plan.tokens_before(plan.step_at(math.ceil(share * plan.total_tokens))) for share in stop.rungs]


def check_rungs(file: Path, stop: Stop, arms: Mapping[str, RunConfig], baseline: str) -> None:
    """Raises ConfigError for a rung inside a warmup or at the end, and for an arm whose held-out text is another."""
    text = _held_out_text(arms[baseline])
    for name, config in arms.items():
        plan = PhasePlan(config)
        for share, tokens in zip(stop.rungs, rung_tokens(stop, config), strict=True):
            step = plan.step_of(tokens)
            assert step is not None
            phase = plan.at(step - 1)
            if tokens < phase.first_token + phase.warmup:
                raise ConfigError(
                    f"{file}: stop.rungs: {share}: {name} is in the warmup of phase {phase.name!r} then, which ends "
                    f"at {(phase.first_token + phase.warmup) / plan.total_tokens:.3g} of its budget: give a later rung"
                )
            if tokens >= plan.total_tokens:
                raise ConfigError(
                    f"{file}: stop.rungs: {share}: {name} ends there, in whole steps: give an earlier one"
                )
        for key, value in _held_out_text(config).items():
            if value != text[key]:
                raise ConfigError(
                    f"{file}: stop: {name} would be ranked by its loss on other held-out text than {baseline}: {key} "
                    f"is {value!r}, there {text[key]!r}: give all arms the same in `set`"
                )


def _held_out_text(config: RunConfig) -> dict[str, Any]:
    own = config.evaluation
    return {
        "evaluation.max_seq_len": own.max_seq_len or config.phases[0].max_seq_len,
        "evaluation.max_rows": own.max_rows,
        "evaluation.masking": own.masking.model_dump(mode="json"),
        "data.tokenizer": config.data.tokenizer,
        "data.streams": {name: stream.path for name, stream in config.data.streams.items()},
    }


def passed(config: RunConfig, tokens: int) -> bool:
    """Whether a run has nothing to train for a rung: it has its loss there, or was beyond it before it was asked."""
    folder = RunFolder(config.folder)
    if folder.finished() is not None or _line(config, tokens) is not None:
        return True
    return any(tokens_of(path) > tokens for path in list_checkpoints(folder.checkpoints))


def losses_at(runs: Mapping[int, RunConfig], tokens: int) -> dict[int, float | None] | None:
    """An arm's held-out losses after so many tokens, by seed, None for one that is not finite; None unless every run
    has one. runs: the arm's, by seed."""
    lines = {seed: _line(config, tokens) for seed, config in runs.items()}
    if any(line is None for line in lines.values()):
        return None
    return {seed: line["validation"]["loss"] for seed, line in lines.items() if line is not None}


def unranked(runs: Mapping[str, Mapping[int, RunConfig]], tokens: Mapping[str, int]) -> list[str]:
    """Arms that have no loss at a rung and will get none: runs of theirs were beyond it before it was asked. runs: by
    arm and seed. tokens: of the rung, by arm."""
    return [
        arm
        for arm, each in runs.items()
        if losses_at(each, tokens[arm]) is None and all(passed(config, tokens[arm]) for config in each.values())
    ]


def _line(config: RunConfig, tokens: int) -> Mapping[str, Any] | None:
    lines = read_lines(RunFolder(config.folder).metrics)
    return next((line for line in lines if line["tokens"] == tokens and "validation" in line), None)


def judge(
    stop: Stop, rung: int, losses: Mapping[str, Mapping[int, float | None]], baseline: str, before: Sequence[Judged]
) -> list[Judged]:
    """Decisions on the arms of `losses` that have none at this rung yet.

    losses: by arm that has come to it, by seed; None is not finite, and ranks last. before: of all rungs, which stay.
    Raises ConfigError when the arms have no seed in common.
    """
    known = {each.arm: each.losses for each in before if each.rung == rung}
    entered = {**losses, **known}
    new = [arm for arm in losses if arm not in known]
    if not new:
        return []
    seeds = set.intersection(*(set(each) for each in entered.values()))
    if not seeds:
        raise ConfigError(
            f"stop: arms at rung {rung} have no seed in common with those that were judged there before: keep a seed "
            "of those, or give the sweep another folder"
        )
    means = {arm: _mean([each[seed] for seed in sorted(seeds)]) for arm, each in entered.items()}
    others = [arm for arm in entered if arm != baseline]
    places = places_at(stop, len(others))
    kept = {baseline, *sorted(others, key=means.__getitem__)[:places]}
    return [Judged(arm, rung, dict(losses[arm]), arm in kept) for arm in new]


def places_at(stop: Stop, arms: int) -> int:
    """How many of so many arms, without the baseline, go on after a rung."""
    return min(arms, max(stop.survivors, math.ceil(arms / stop.reduction)))


def _mean(values: Sequence[float | None]) -> float:
    return sum(math.inf if value is None else value for value in values) / len(values)


def read_judged(folder: Path, stop: Stop | None = None, baseline: str | None = None) -> list[Judged]:
    """What was decided in a sweep's folder. stop: the rule as it is now. baseline: as it is now, which always goes on,
    also when it was stopped as an arm before.

    Raises ConfigError for a damaged file, and when decisions were made by another rule.
    """
    file = folder / FILE
    if not file.exists():
        return []
    try:
        node = json.loads(file.read_text())
        judged = [
            Judged(**{**each, "losses": {int(seed): v for seed, v in each["losses"].items()}})
            for each in node["judged"]
        ]
        judged = [replace(each, kept=True) if each.arm == baseline else each for each in judged]
        rule = node["rule"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(
            f"{file}: damaged: remove it, and the same `sweep` command judges the arms anew by the losses they had"
        ) from None
    if stop is not None and judged and rule != stop.model_dump(mode="json"):
        raise ConfigError(
            f"{file}: arms were judged by {rule}, which `stop` says no more: undo that, or give another folder"
        )
    return judged


def write_judged(folder: Path, stop: Stop, judged: Sequence[Judged]) -> None:
    node = {"rule": stop.model_dump(mode="json"), "judged": [asdict(each) for each in judged]}
    write_file(folder / FILE, json.dumps(node, indent=1) + "\n")
