"""What every room shares: strict config schemas, named registries, and errors a user can act on.

A component (layer, norm, schedule, data source, ...) is one class or function registered under a name in a slot.
Its YAML name works at once:

    @NORMS.register("rmsnorm")
    class RMSNorm(nn.Module):
        class Config(Component):
            eps: float = Field(1e-6, gt=0)

        def __init__(self, config, *, hidden_size): ...

    class BlockConfig(Schema):
        norm: Annotated[Any, *NORMS.slot()] = "layernorm"

Both `norm: rmsnorm` and `norm: {name: rmsnorm, eps: 1e-5}` then validate, to `RMSNorm.Config(name="rmsnorm", eps=...)`.
"""

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, model_validator

T = TypeVar("T")


class ConfigError(Exception):
    """The user's input is wrong: each line of the message names file, key, what is wrong and the fix. Exit code 2."""


class RunError(Exception):
    """The run cannot go on (damaged shard, full disk, ...): one line that names what and where. Exit code 1."""


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest valid one, or all of them when none is near."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"valid names: {', '.join(valid)}"


class Schema(BaseModel):
    """Base of every config: frozen, strict types, no unknown keys. Defaults are validated like given values."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_keys(cls, node: Any) -> Any:
        if isinstance(node, dict):
            unknown = [str(key) for key in node if key not in cls.model_fields]
            if unknown:
                raise ValueError("; ".join(f"unknown key {key!r}, {did_you_mean(key, cls.model_fields)}" for key in unknown))
        return node


class Component(Schema):
    """Base of the Config of a registered entry. `name` is the registered name."""

    name: str


class Registry:
    """Named implementations of one slot."""

    def __init__(self, slot_name: str) -> None:
        self.slot_name = slot_name
        self.entries: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator. The entry must carry a `Config` derived from Component (a class attribute; for a function, set it)."""

        def add(entry: T) -> T:
            if name in self.entries:
                raise ValueError(f"{self.slot_name} {name!r} is registered twice")
            self.entries[name] = entry
            return entry

        return add

    def parse(self, node: Any) -> Component:
        """Validate a name, or a mapping with `name`, against the entry's own Config."""
        if isinstance(node, BaseModel):
            node = node.model_dump()
        if not isinstance(node, dict):
            node = {"name": node}
        name = str(node.get("name"))
        if name not in self.entries:
            raise ValueError(f"unknown {self.slot_name} {name!r}, {did_you_mean(name, self.entries)}")
        return self.entries[name].Config.model_validate(node)

    def slot(self) -> tuple[Any, Any]:
        """Annotation metadata for a config field that holds one entry of this registry: `Annotated[Any, *R.slot()]`."""
        return BeforeValidator(self.parse), PlainSerializer(lambda config: config.model_dump())

    def build(self, config: Component, **runtime: Any) -> Any:
        """Construct the entry named by `config`; runtime facts (hidden_size, layer_index, ...) are keywords."""
        return self.entries[config.name](config, **runtime)


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(value: Any) -> int:
    """A count of tokens or bytes: a plain integer, `1e9`, or a number with K, M, B or T: `1.719T`, `50B`, `300K`."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a count such as 50B, 300K or 1000000, got {value!r}")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([KMBT]?)\s*", value, re.IGNORECASE)
        if match is None:
            raise ValueError(f"expected a count such as 50B, 300K or 1000000, got {value!r}")
        number = float(match[1]) * _UNITS[match[2].upper()]
    else:
        number = value
    if number != round(number):
        raise ValueError(f"expected a whole count, got {value!r}")
    return round(number)


Count = Annotated[int, BeforeValidator(parse_count)]
