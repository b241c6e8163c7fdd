"""A few tokens through a model with parts of the user's, so that a wrong shape is told before a run starts."""

from typing import Any

import torch

from flexbert import FlexBertConfig, FlexBertForMaskedLM
from flexbert.registry import SLOTS
from flexbert_core.calling import place_of
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig
from recipe.imports import PREFIX

# Slots whose modules give the shape that they are given; an embedding's adds a dimension.
_KEEP_SHAPE = ("block", "attention", "norm", "mlp", "activation", "head")
_SLOTS = ("embedding", *_KEEP_SHAPE)


def shape_faults(config: RunConfig) -> list[str]:
    """A line for a part of `imports` that gives another shape than its slot wants.

    The initial layers and two more run, and the head, on the CPU. A part may need a GPU, so other errors are left to
    the run.
    """
    if not config.imports or not _own():
        return []
    node, initial = config.model.to_dict(), config.model.initial_layers
    layers = min(config.model.num_hidden_layers, 2 + (0 if initial is None else initial.count))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model = FlexBertForMaskedLM(FlexBertConfig.from_dict({**node, "num_hidden_layers": layers})).eval()
            for module in model.modules():
                if said := _own().get(type(module)):
                    more = (config.model.hidden_size,) if said.startswith("embedding:") else ()
                    module.register_forward_hook(_check(said, more))
            model(torch.zeros(6, dtype=torch.int64), torch.tensor([0, 4, 6], dtype=torch.int32), 4)
    except ConfigError as error:
        return [f"model.{error}"]
    except Exception:
        return []
    return []


def _own() -> dict[type, str]:
    """The user's classes, and how they are named."""
    return {
        entry: f"{slot}: {name} ({place_of(entry)})"
        for slot in _SLOTS
        for name, entry in SLOTS[slot].loaded.items()
        if isinstance(entry, type) and SLOTS[slot].registered_by[name].startswith(PREFIX)
    }


def _check(said: str, more: tuple[int, ...]) -> Any:
    """more: dimensions that the result has behind those of what is given."""

    def check(module: Any, given: tuple[Any, ...], result: Any) -> None:
        shape, found = tuple(given[0].shape), getattr(result, "shape", None)
        wanted = (*shape, *more)
        fix = f"give {wanted}" if more else "give the same shape"
        if found is None:
            raise ConfigError(f"{said}: forward gives a {type(result).__name__} for {shape}: {fix}, a tensor")
        if tuple(found) != wanted:
            raise ConfigError(f"{said}: forward gives {tuple(found)} for {shape}: {fix}")

    return check
