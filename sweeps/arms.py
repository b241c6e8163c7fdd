"""From a sweep file to arms: which config each of them trains, and that it differs in nothing else.

An arm is a run file: the base with `set`, then the baseline's own changes or the arm's. Both are resolved whole and
compared leaf by leaf, so that a change which drags another one along (another optimizer's default weight decay) is
refused before anything is trained.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.keyed import keyed_generator
from flexbert_core.composing import override
from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import ConfigError, named
from recipe.config import RunConfig, load_run_config
from recipe.phases import PhasePlan
from sweeps.equal import adjusted
from sweeps.file import ARM, Random, Range, Search, SweepFile
from sweeps.searching import TRIAL, ends_of, name_of, read_search
from sweeps.stopping import check_rungs

ABSENT = "not there"
# What a sweep sets itself, or what says nothing about what is trained.
_OWN = ("name", "runs", "seed")


@dataclass(frozen=True)
class Variant:
    """An arm with what it trains. config: of no seed in particular."""

    name: str
    changes: Mapping[str, Any]
    config: RunConfig
    overrides: Sequence[str]
    """Of the base file, from which the config of a seed is made."""
    adjusted: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Design:
    """All arms of a sweep file, the baseline first."""

    file: Path
    sweep: SweepFile
    base: Path
    arms: Sequence[Variant]

    @property
    def baseline(self) -> Variant:
        return self.arms[0]

    @property
    def folder(self) -> Path:
        """Of the sweep."""
        if self.sweep.folder is not None:
            return Path(self.sweep.folder)
        return Path(self.baseline.config.runs) / f"sweep-{self.file.stem}"

    def cell(self, arm: Variant, seed: int) -> RunConfig:
        """What an arm trains with a seed."""
        name = cell_name(arm.name, seed)
        own = [f"seed={seed}", override("name", name), override("runs", str(self.folder / "runs"))]
        own.append(override("evaluations", self._evaluations(arm)))
        if arm.config.checkpoint.remote is not None:  # runs of another sweep may have the same names
            remote = f"{arm.config.checkpoint.remote.rstrip('/')}/{self.folder.name}"
            own.append(override("checkpoint.remote", remote))
        own += _branch(self.sweep, seed)
        with named(f"{self.file}: {arm.name}"):
            return load_run_config(self.base, [*arm.overrides, *own])

    def _evaluations(self, arm: Variant) -> list[Any]:
        """The run file's, the sweep's, and the loss on each held-out document, in pieces that all arms can take."""
        entries = [each.model_dump(mode="json") for each in (*arm.config.evaluations, *self.sweep.evaluations)]
        if any(each["name"] == "held_out_documents" for each in entries):
            return entries
        longest = min(each.config.model.max_position_embeddings for each in self.arms)
        pieces = min(longest, PhasePlan(self.baseline.config).phases[0].max_seq_len)
        return [*entries, {"name": "held_out_documents", "max_seq_len": pieces}]


def cell_name(arm: str, seed: int) -> str:
    """Of its run and its files."""
    return f"{re.sub('[=,+]', '_', arm)}-s{seed}"


def expand(file: Path, sweep: SweepFile) -> Design:
    """Raises ConfigError, naming the arm, for a config that is wrong, one that differs from the baseline in more than
    it says or in nothing, keys that a sweep sets itself, names that come twice, and rungs at which it cannot be
    stopped."""
    base = Path(sweep.base) if Path(sweep.base).is_absolute() else file.parent / sweep.base
    for text in sweep.set:
        # Not runs: by default the sweep's folder lies there.
        _check_free(file, sweep, "set", text.partition("=")[0].strip(), ("name", "seed"))
    changes = _changes(file, sweep)
    if sweep.baseline not in changes:
        if sweep.baseline != "baseline":
            raise ConfigError(
                f"{file}: baseline: {sweep.baseline!r} is no arm, {did_you_mean(sweep.baseline, changes)}"
            )
        changes = {"baseline": {}, **changes}
    own = _variant(file, sweep, base, sweep.baseline, changes.pop(sweep.baseline))
    if sweep.search is not None:
        with named(f"{file}: search"):
            changes |= _found(file, sweep.search, Design(file, sweep, base, [own]), changes)
    for name in sweep.slots_per_second:
        if name not in changes and name != own.name and not (sweep.search and name.startswith(TRIAL)):
            raise ConfigError(
                f"{file}: slots_per_second: {name!r} is no arm, {did_you_mean(name, [*changes, own.name])}"
            )
    arms = [own, *(_variant(file, sweep, base, name, change) for name, change in changes.items())]
    names = [cell_name(arm.name, 0) for arm in arms]
    if twice := [arm.name for arm, name in zip(arms, names, strict=True) if names.count(name) > 1]:
        raise ConfigError(f"{file}: arms {', '.join(twice)} have one name as folders: rename one under `list`")
    design = Design(file, sweep, base, [own])
    made = [own, *(_checked(design, arm) for arm in arms[1:])]
    for arm in made:
        if arm.config.publish is not None:
            raise ConfigError(
                f"{file}: {arm.name}: publish: its runs would overwrite one another: say publish=null in `set`"
            )
    if sweep.stop is not None:
        check_rungs(file, sweep.stop, {arm.name: arm.config for arm in made}, own.name)
    return Design(file, sweep, base, made)


def arm_of(design: Design, name: str, changes: Mapping[str, Any], *, may_be_baseline: bool = False) -> Variant:
    """Another arm beside those of a design, with what `equal` adjusts. Raises ConfigError as `expand` does.

    may_be_baseline: it may train the same, as a trial may.
    """
    arm = _variant(design.file, design.sweep, design.base, name, changes)
    return _checked(design, arm, may_be_baseline=may_be_baseline)


def _checked(design: Design, arm: Variant, *, may_be_baseline: bool = False) -> Variant:
    made = _fair(design.file, design.sweep, design.base, arm, design.baseline)
    if not may_be_baseline or difference(made.config, design.baseline.config):
        _check_differs(design.file, made, design.baseline)
    return made


def _found(file: Path, search: Search, design: Design, changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Arms that the search has chosen so far. Raises ConfigError for paths that are none, for those that `equal`
    adjusts, and for a name taken."""
    if taken := [name for name in changes if re.fullmatch(rf"{TRIAL}\d+", name)]:
        raise ConfigError(f"{taken[0]!r} is the name of a trial: name that arm otherwise")
    first, last = ends_of(search)
    _variant(file, design.sweep, design.base, "a trial", first)
    for point in (first, last) if design.sweep.equal is not None else ():
        try:
            arm = _variant(file, design.sweep, design.base, "a trial", point)
            adjusts = _adjusted(file, design.sweep, arm, design.baseline)
        except ConfigError:  # these values together are no model, say: a trial of them fails by itself
            continue
        _check_clash(file, design.sweep, arm, adjusts)
    trials = read_search(design.folder, search)
    return {name_of(trial.number): dict(trial.changes) for trial in trials if trial.chosen}


def _changes(file: Path, sweep: SweepFile) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    points = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    points_drawn = [] if sweep.random is None else drawn(sweep.random)
    arms = [(_title(point), point) for point in points if point]
    arms += [*sweep.listed.items(), *((f"random-{number}", point) for number, point in enumerate(points_drawn))]
    for name, change in arms:
        if not re.fullmatch(ARM, name):
            raise ConfigError(f"{file}: grid: {name!r} is no name for an arm: name it under `list`")
        if name in found:
            raise ConfigError(f"{file}: two arms are called {name!r}: name them under `list`")
        found[name] = dict(change)
    return found


def _title(point: Mapping[str, Any]) -> str:
    """Such as window=128,theta=10000: the last part of each path, more of it where that says too little."""
    lasts = [path.split(".")[-1] for path in point]
    keys = [last if lasts.count(last) == 1 else path for path, last in zip(point, lasts, strict=True)]
    shown = (value if isinstance(value, str) else json.dumps(value) for value in point.values())
    return ",".join(
        f"{re.sub('[^A-Za-z0-9_.]', '_', key)}={re.sub('[^A-Za-z0-9_.-]+', '_', value)}"
        for key, value in zip(keys, shown, strict=True)
    )


def drawn(random: Random) -> list[dict[str, Any]]:
    """Changes of the arms, each arm from a generator of its own, so that more of them change none."""
    points = []
    for number in range(random.arms):
        generator = keyed_generator(random.seed, "random arms", number)
        points.append({path: _value(values, generator) for path, values in random.values.items()})
    return points


def _value(values: Range | Sequence[Any], generator: np.random.Generator) -> Any:
    if not isinstance(values, Range):
        return values[int(generator.integers(len(values)))]
    # Whole numbers are the middles of pieces of the range, so that each has its share.
    half = 0.5 if values.integer else 0.0
    low, high = values.low - half, values.high + half
    if values.log:
        number = float(np.exp(generator.uniform(np.log(low), np.log(high))))
    else:
        number = float(generator.uniform(low, high))
    return values.value(min(max(number, values.low), values.high))


def _variant(file: Path, sweep: SweepFile, base: Path, name: str, changes: Mapping[str, Any]) -> Variant:
    for path in changes:
        _check_free(file, sweep, name, path, _OWN)
    own = [override(path, value) for path, value in changes.items()]
    overrides = [*sweep.set, *_branch(sweep, sweep.seeds[0]), *own]
    with named(f"{file}: {name}"):
        return Variant(name, changes, load_run_config(base, overrides), overrides)


def _check_free(file: Path, sweep: SweepFile, place: str, path: str, own: Sequence[str]) -> None:
    """own: keys that the sweep sets. Raises ConfigError for one of them, and for a start beside branch_from."""
    if path in own:
        fix = "use seeds" if path == "seed" else "leave it out"
        raise ConfigError(f"{file}: {place}: {path}: a sweep sets this itself: {fix}")
    if sweep.branch_from is not None and path.split(".")[0] == "from":
        raise ConfigError(f"{file}: {place}: {path}: branch_from says where every arm starts: leave one of both out")


def _branch(sweep: SweepFile, seed: int) -> list[str]:
    origin = sweep.origin(seed)
    return [] if origin is None else [override("from", origin)]


def _fair(file: Path, sweep: SweepFile, base: Path, arm: Variant, baseline: Variant) -> Variant:
    """With what `equal` adjusts."""
    if sweep.equal is None:
        return arm
    changes = _adjusted(file, sweep, arm, baseline)
    _check_clash(file, sweep, arm, changes)
    overrides = [*arm.overrides, *(override(path, value) for path, value in changes.items())]
    with named(f"{file}: {arm.name}: equal"):
        return Variant(arm.name, arm.changes, load_run_config(base, overrides), overrides, changes)


def _adjusted(file: Path, sweep: SweepFile, arm: Variant, baseline: Variant) -> dict[str, Any]:
    assert sweep.equal is not None
    with named(f"{file}: {arm.name}: equal"):
        return adjusted(sweep.equal, arm.config, baseline.config, sweep.slots_per_second, arm.name, baseline.name)


def _check_clash(file: Path, sweep: SweepFile, arm: Variant, changes: Mapping[str, Any]) -> None:
    if clash := [path for path in changes if any(lies_in(path, own) for own in arm.changes)]:
        raise ConfigError(
            f"{file}: {arm.name}: equal: {sweep.equal} would change {clash[0]}, which the arm sets itself"
        )


def difference(ours: RunConfig, theirs: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Every leaf in which two resolved configs differ, (ours, theirs); ABSENT where one has no such leaf."""
    first, second = (
        _leaves({k: v for k, v in config.model_dump(mode="json").items() if k not in _OWN}) for config in (ours, theirs)
    )
    return {
        path: (first.get(path, ABSENT), second.get(path, ABSENT))
        for path in sorted(first.keys() | second.keys())
        if first.get(path, ABSENT) != second.get(path, ABSENT)
    }


def _leaves(node: Any, place: str = "") -> dict[str, Any]:
    """With numbers for the places in lists: phases.0.lr."""
    if isinstance(node, Mapping) and node:
        parts: Any = node.items()
    elif isinstance(node, list) and node:
        parts = enumerate(node)
    else:
        return {place: node}
    return {
        path: leaf
        for key, part in parts
        for path, leaf in _leaves(part, f"{place}.{key}" if place else str(key)).items()
    }


def _check_differs(file: Path, arm: Variant, baseline: Variant) -> None:
    found = difference(arm.config, baseline.config)
    if not found:
        raise ConfigError(
            f"{file}: {arm.name}: trains the same as {baseline.name}: leave it out, or name it as `baseline`"
        )
    if all(path.split(".")[0] == "ema" for path in found):
        raise ConfigError(
            f"{file}: {arm.name}: differs from {baseline.name} in `ema` alone, which moves no weight, and arms are "
            "compared by their weights: put `ema` in `set`, and read validation_ema in each metrics.jsonl"
        )
    said = [*arm.changes, *baseline.changes, *arm.adjusted]
    said += [
        f"phases.{number}.masking{path.removeprefix('masking')}"
        for path in said
        if path.split(".")[0] == "masking"
        for number in range(len(arm.config.phases))
    ]
    said += ["model"] if any(path == "model.preset" for path in said) else []
    # Another component brings keys of its own, and takes those of the one before along.
    swapped = tuple(path.removesuffix("name") for path in said if path.endswith(".name"))
    unsaid = [
        path
        for path, sides in found.items()
        if not any(lies_in(path, own) for own in said)
        and not (ABSENT in sides and swapped and path.startswith(swapped))
    ]
    if unsaid:
        ours, theirs = found[unsaid[0]]
        more = f", and {len(unsaid) - 1} more keys" if unsaid[1:] else ""
        raise ConfigError(
            f"{file}: {arm.name}: differs from {baseline.name} in more than it says: {unsaid[0]} is {ours!r}, there "
            f"{theirs!r}{more}: say it in the arm, or in `set` for all"
        )


def lies_in(path: str, said: str) -> bool:
    """Whether a path is the said one, or lies in it."""
    plain = re.sub(r"\[([^\]]*)\]", r".\1", said)
    return path == plain or path.startswith(f"{plain}.")
