"""Callbacks, algorithms and loggers that a run file names: made from their entries, their state kept in checkpoints."""

import base64
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Algorithm, Callback, Time, Timestamp
from composer.loggers import LoggerDestination
from torch import Tensor

from flexbert_core.schema import Component, ConfigError, Registry, RunError, named
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from recipe.slots import ALGORITHMS, CALLBACKS, EVALUATIONS, LOGGERS

# What the entries of each slot are constructed with: recipe.slots.
_FACTS: dict[str, tuple[Registry, tuple[str, ...]]] = {
    "callbacks": (CALLBACKS, ("plan", "folder")),
    "algorithms": (ALGORITHMS, ("plan", "folder")),
    "loggers": (LOGGERS, ("name", "run", "folder")),
    "evaluations": (EVALUATIONS, ("run", "plan", "streams", "folder")),
}


class Parts:
    """What a run file adds to a run. Each is built in every process."""

    def __init__(self, config: RunConfig, plan: PhasePlan, folder: Path) -> None:
        """folder: runs/NAME. Raises ConfigError, starting with the key, for one that refuses its arguments."""
        self._folder = folder
        facts = {"plan": plan, "folder": folder}
        self.callbacks: list[Callback] = build_parts("callbacks", CALLBACKS, config.callbacks, **facts)
        self.algorithms: list[Algorithm] = build_parts("algorithms", ALGORITHMS, config.algorithms, **facts)
        facts = {"name": config.name, "run": config.model_dump(mode="json"), "folder": folder}
        self.loggers: list[LoggerDestination] = build_parts("loggers", LOGGERS, config.loggers, **facts)
        named = zip([*config.callbacks, *config.algorithms], [*self.callbacks, *self.algorithms], strict=True)
        self._stateful = by_name([(_name(entry), part) for entry, part in named])

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The states by name of the part: JSON values, and the tensors in them. Called on all ranks; as with Composer's
        own checkpoints, rank 0's are kept.

        Raises RunError naming the part whose state holds what a checkpoint, which is never unpickled, cannot keep.
        """
        states, tensors = dict[str, Any](), dict[str, Tensor]()
        for name, part in self._stateful.items():
            try:
                states[name] = pack(part.state_dict(), name, tensors)
            except TypeError as error:
                raise RunError(f"{name}: its state_dict() cannot be saved: {error}") from None
        return states, tensors

    def load_state_dict(self, states: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Give each part its state; one that was not there when the checkpoint was written begins anew."""
        for name, part in self._stateful.items():
            if name in states:
                part.load_state_dict(unpack(states[name], tensors))


def build_parts(key: str, registry: Registry, configs: list[Component], **runtime: Any) -> list[Any]:
    """The entries that a list of a run file names. Raises ConfigError, starting with the key, for one that refuses."""
    parts = []
    for number, config in enumerate(configs):
        with named(f"{key}[{number}]"):
            registry.check_call(config.name, runtime)
        try:
            parts.append(registry.build(config, **runtime))
        except ValueError as error:
            raise ConfigError(f"{key}[{number}].{error}") from None
    return parts


def part_faults(config: RunConfig) -> list[str]:
    """A line for each that does not take what it will be given. None is built: that may open files."""
    faults = []
    for key, (registry, facts) in _FACTS.items():
        for number, part in enumerate(getattr(config, key)):
            try:
                registry.check_call(part.name, facts)
            except ConfigError as error:
                faults.append(f"{key}[{number}]: {error}")
    return faults


def _name(config: Component) -> str:
    """Of an entry, for its state: with the class, where it is one of Composer's."""
    return "/".join([config.name, *([config.class_name] if hasattr(config, "class_name") else [])])  # pyright: ignore


def by_name(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The second of a name gets `#2`."""
    named: dict[str, Any] = {}
    for name, part in pairs:
        number, key = 1, name
        while key in named:
            number += 1
            key = f"{name}#{number}"
        named[key] = part
    return named


def pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """A state as JSON values; its tensors and arrays go to `tensors` under their place.

    Raises TypeError naming the place of what is neither a plain value nor a time of Composer's.
    """
    if isinstance(value, torch.Tensor):
        tensors[place] = value.detach().to("cpu", copy=True).contiguous()
        return {"$": "tensor", "place": place}
    if isinstance(value, np.ndarray):
        return {"$": "array", "tensor": pack(torch.from_numpy(value), place, tensors)}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return {"$": "bytes", "base64": base64.b64encode(value).decode()}
    if isinstance(value, timedelta):
        return {"$": "timedelta", "microseconds": value // timedelta(microseconds=1)}
    if isinstance(value, Time):
        return {"$": "time", "text": value.to_timestring()}
    if isinstance(value, Mapping):
        pairs = [[pack(key, place, tensors), pack(each, f"{place}/{key}", tensors)] for key, each in value.items()]
        if all(isinstance(key, str) and key != "$" for key in value):
            return dict(pairs)
        return {"$": "mapping", "pairs": pairs}
    if isinstance(value, list | tuple | set | frozenset):
        items = [pack(each, f"{place}/{number}", tensors) for number, each in enumerate(value)]
        return items if isinstance(value, list) else {"$": type(value).__name__, "items": items}
    raise TypeError(f"{place} is a {type(value).__name__}: give numbers, text, tensors, or lists and mappings of them")


def unpack(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(node, list):
        return [unpack(each, tensors) for each in node]
    if not isinstance(node, dict):
        return node
    match node.get("$"):
        case None:
            return {key: unpack(each, tensors) for key, each in node.items()}
        case "tensor":
            return tensors[node["place"]].clone()
        case "array":
            return unpack(node["tensor"], tensors).numpy()
        case "bytes":
            return base64.b64decode(node["base64"])
        case "timedelta":
            return timedelta(microseconds=node["microseconds"])
        case "time":
            return Time.from_timestring(node["text"])
        case "mapping":
            return {unpack(key, tensors): unpack(each, tensors) for key, each in node["pairs"]}
    kinds = {"tuple": tuple, "set": set, "frozenset": frozenset}
    return kinds[node["$"]](unpack(each, tensors) for each in node["items"])


def timestamp_of(step: int, state: Mapping[str, Any]) -> Timestamp:
    """Composer's clock after `step` steps of a checkpoint's state, so that what counts in its tokens or samples goes
    on."""
    timestamp = Timestamp(batch=step, batch_in_epoch=step)
    if "timestamp" in state:  # not up to commit ac193e8, nor of a branch's first checkpoint
        timestamp.load_state_dict(unpack(state["timestamp"], {}))
    return timestamp
