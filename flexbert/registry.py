"""The slots of a model, and the decorator that fills them.

| slot | entry | constructed with |
|---|---|---|
| embedding | module: input_ids (T,) int64 -> (T, D) | model |
| position | positions.Position | head_dim |
| attention | module: (hidden_states, plan, rotations) -> (T, D) | hidden_size, num_attention_heads, layer_index |
| norm | module: (..., D) -> (..., D) | hidden_size |
| mlp | module: (T, D) -> (T, D) | hidden_size, intermediate_size |
| block | module: (hidden_states, plan, rotations) -> (T, D); class attribute `needs_final_norm` | model, layer_index |
| head | heads.Head | model |
| init | callable: (module, seed, prefix) -> None | num_hidden_layers |

`model` is the FlexBertConfig. T packed tokens, D hidden.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from schema import Component, ConfigError, Registry, did_you_mean

if TYPE_CHECKING:
    from flexbert.config import FlexBertConfig

T = TypeVar("T")

EMBEDDINGS = Registry("embedding")
POSITIONS = Registry("position")
ATTENTIONS = Registry("attention")
NORMS = Registry("norm")
MLPS = Registry("mlp")
BLOCKS = Registry("block")
HEADS = Registry("head")
INITS = Registry("init")
SLOTS = {slot.slot_name: slot for slot in (EMBEDDINGS, POSITIONS, ATTENTIONS, NORMS, MLPS, BLOCKS, HEADS, INITS)}


class ModelComponent(Component):
    """Base of the Config of entries that have rules across fields of the model."""

    def check(self, model: "FlexBertConfig") -> None:
        """Raise ValueError `field: what is wrong: fix` when this component does not fit the model around it."""


def register(slot: str, name: str) -> Callable[[T], T]:
    """Class decorator: make a component known to YAML as `SLOT: NAME`. See the module's table for what a slot expects.

    The class carries a `Config` derived from schema.Component (or ModelComponent, for rules across fields).
    Raises ConfigError for an unknown slot, ValueError for a name that is taken.
    """
    return _slot(slot).register(name)


def registered(slot: str) -> list[str]:
    """Sorted names in a slot. Raises ConfigError for an unknown slot."""
    return sorted(_slot(slot).entries)


def _slot(slot: str) -> Registry:
    if slot not in SLOTS:
        raise ConfigError(f"unknown slot {slot!r}, {did_you_mean(slot, SLOTS)}")
    return SLOTS[slot]
