"""The slots of a model, and the decorator that fills them.

| slot | entry | constructed with |
|---|---|---|
| embedding | module: (input_ids (T,), added (T, D) or None, token_type_ids (T,) or None) -> (T, D) | model |
| position | positions.Position | model |
| attention | module: (hidden_states, plan, positions) -> (T, D) | hidden_size, num_attention_heads, layer_index |
| norm | module: (..., D) -> (..., D) | hidden_size |
| activation | function of a tensor, or module class constructed without arguments; no Config, a name is all | |
| mlp | module: (T, D) -> (T, D) | hidden_size, intermediate_size |
| block | module: (hidden_states, plan, positions) -> (T, D); class attribute `needs_final_norm` | model, layer_index |
| head | heads.Head (task mlm), or heads.TaskHead; class attribute `task` | model |
| loss | callable: (hidden_states (M, D), weight (V, D), bias (V,) or None, targets (M,), scores to fill) -> sum | |
| init | callable: (module, seed, prefix) -> None; with `grows`, one argument more | num_hidden_layers |

`model` is the FlexBertConfig, as it is for the layer in question. An attention or block with `selects_tokens` takes one
more argument, `wanted`: see flexbert/blocks.py; it may do without.
An init with the class attribute `grows` takes the model that `build` was told to grow from, or None.
T packed tokens, M masked ones, D hidden, V vocabulary.
"""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator

from flexbert.activations import FUNCTIONS
from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import Component, ConfigError, Registry, Shown, named

T = TypeVar("T")


class ModelComponent(Component):
    """Base of the Config of entries that have rules across fields of the model, a FlexBertConfig."""

    def check(self, model: Any) -> None:
        """Raise ValueError `field: what is wrong: fix` when this component does not fit the model around it."""

    def unread(self, model: Any) -> list[str]:
        """`field: why` for what is said here and acts on nothing in this model. `build` warns of it: recorded configs
        may hold it, and must load."""
        return []


class ModelSlot(Registry):
    """A slot of a model. It knows which module registered a name: exports carry the files of parts from outside."""

    def __init__(self, slot_name: str, has_config: bool = True, attribute: str | None = None) -> None:
        """attribute: of the class, which entries must have."""
        super().__init__(slot_name, has_config)
        self.attribute = attribute
        self.registered_by: dict[str, str] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """As Registry's. Raises ValueError, too, for an entry without the slot's attribute, and for a Config with a
        `check` that nobody would call."""
        add = super().register(name)
        module = _caller()

        def checked(entry: T) -> T:
            if self.attribute is not None and not hasattr(entry, self.attribute):
                raise ValueError(
                    f"{self.slot_name} {name!r} has no class attribute `{self.attribute}`: see "
                    f"docs/extending/{self.slot_name}.md"
                )
            config = getattr(entry, "Config", None)
            if callable(getattr(config, "check", None)) and not issubclass(config, ModelComponent):  # pyright: ignore
                raise ValueError(
                    f"{self.slot_name} {name!r} has a Config with a `check` that is never called: derive it from "
                    "flexbert.config.ModelComponent, or give the method another name"
                )
            added = add(entry)
            self.registered_by[name] = module
            return added

        return checked


def _caller() -> str:
    """The module outside this one whose statement runs. What it registers may be a function of another library's."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") == __name__ and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    return "" if frame is None else frame.f_globals.get("__name__", "")


EMBEDDINGS = ModelSlot("embedding")
POSITIONS = ModelSlot("position")
ATTENTIONS = ModelSlot("attention")
NORMS = ModelSlot("norm")
ACTIVATIONS = ModelSlot("activation", has_config=False)
MLPS = ModelSlot("mlp")
BLOCKS = ModelSlot("block", attribute="needs_final_norm")
HEADS = ModelSlot("head", attribute="task")
LOSSES = ModelSlot("loss")
INITS = ModelSlot("init")
for _name, _function in FUNCTIONS.items():
    ACTIVATIONS.register(_name)(_function)
SLOTS = {
    slot.slot_name: slot
    for slot in (EMBEDDINGS, POSITIONS, ATTENTIONS, NORMS, ACTIVATIONS, MLPS, BLOCKS, HEADS, LOSSES, INITS)
}

ELSEWHERE = {
    "optimizer": "recipe.slots.OPTIMIZERS",
    "parallelism": "recipe.slots.PARALLELISMS",
    "objective": "recipe.slots.OBJECTIVES",
    "evaluations": "recipe.slots.EVALUATIONS",
    "callbacks": "recipe.slots.CALLBACKS",
    "algorithms": "recipe.slots.ALGORITHMS",
    "loggers": "recipe.slots.LOGGERS",
    "schedule": "recipe.schedules.SCHEDULES",
    "masking": "data.feed.masking.MASKINGS",
    "source": "data.preparation.sources.base.SOURCES",
    "filter": "data.preparation.filters.base.FILTERS",
    "tokenizer": "data.tokenizer.TOKENIZERS",
    "executor": "data.preparation.executors.base.EXECUTORS",
    "eval": "evals.interface.EVALS",
}
"""The registries of all other slots: rooms above this one, which it may not import."""


def _known_activation(name: str) -> str:
    ACTIVATIONS.known(name)
    return name


# Type of a config field that names an entry of the slot `activation`.
ACTIVATION = AfterValidator(_known_activation)
Activation = Annotated[str, ACTIVATION, Shown(lambda _: {"enum": sorted(ACTIVATIONS.entries), "x-open": True})]


def build_activation(name: str) -> Any:
    """The function, or a fresh module, that an Activation field names. Raises ConfigError for a module class that wants
    arguments."""
    entry = ACTIVATIONS.entries[name]
    if not isinstance(entry, type):
        return entry
    with named(ACTIVATIONS.slot_name):
        ACTIVATIONS.check_call(name, ())
    return entry()


def register(slot: str, name: str) -> Callable[[T], T]:
    """Class decorator: make a component known to YAML as `SLOT: NAME`. See the module's table for what a slot expects.

    The class carries a `Config` derived from flexbert_core.schema.Component, or from flexbert.config.ModelComponent for
    rules across fields.
    Raises ConfigError for an unknown slot, ValueError for a name that is taken or a Config that is none of these.
    """
    return _slot(slot).register(name)


def registered(slot: str) -> list[str]:
    """Sorted names in a slot. Raises ConfigError for an unknown slot."""
    return sorted(_slot(slot).entries)


def _slot(slot: str) -> Registry:
    for each in (slot, f"{slot}s"):
        if place := ELSEWHERE.get(each):
            module, _, registry = place.rpartition(".")
            raise ConfigError(
                f"unknown slot {slot!r}: it is none of a model's: `from {module} import {registry}`, and write "
                f'`@{registry}.register("NAME")`'
            )
    if slot not in SLOTS:
        raise ConfigError(f"unknown slot {slot!r}, {did_you_mean(slot, SLOTS)}")
    return SLOTS[slot]
