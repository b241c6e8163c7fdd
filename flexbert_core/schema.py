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

import importlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetJsonSchemaHandler,
    PlainSerializer,
    ValidationError,
    model_validator,
)
from pydantic.config import JsonDict

from flexbert_core.calling import call_fault, place_of
from flexbert_core.kinds import other_kind
from flexbert_core.misspelt import did_you_mean, unknown_keys

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
S = TypeVar("S", bound=BaseModel)


class ConfigError(Exception):
    """The user's input is wrong: each line of the message names file, key, what is wrong and the fix. Exit code 2.

    What of the input cannot be printed is shown escaped, and a line longer than 2000 characters loses its middle.
    """

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(_printable(line) for line in message.split("\n")))


@contextmanager
def named(place: str | Path) -> Iterator[None]:
    """Put `place: ` in front of each line of a ConfigError from inside."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError("\n".join(f"{place}: {line}" for line in str(error).split("\n"))) from None


def plain_console(**options: Any) -> "Console":
    """A console of rich's that prints the user's paths and names as they are: no [markup], no :emoji:, no colours for
    what looks like a number.

    Style is a Text's or a table's. A Panel's title must be a Text: a str is markup there, whatever the console says.
    """
    from rich.console import Console

    return Console(**{"markup": False, "emoji": False, "highlight": False, **options})


class RunError(Exception):
    """The run cannot go on (damaged shard, full disk, ...): one line that names what and where. Exit code 1."""


def _printable(line: str) -> str:
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
    return line if len(line) <= 2000 else f"{line[:1200]} ... {line[-780:]}"


class Schema(BaseModel):
    """Base of every config: frozen, strict types, no unknown keys. Defaults are validated like given values.

    A field's help text is its `description`, or the docstring below it.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        serialize_by_alias=True,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_keys(cls, node: Any) -> Any:
        if isinstance(node, dict):
            known = [field.alias or name for name, field in cls.model_fields.items()]
            unknown = [str(key) for key in node if key not in known]
            if unknown:
                raise ValueError(unknown_keys(unknown, known))
        return node


class Component(Schema):
    """Base of the Config of a registered entry. `name` is the registered name."""

    name: str


class Shown:
    """Metadata of a field whose YAML may hold more than its Python type says: how its JSON Schema differs."""

    def __init__(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.change = change

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return self.change(handler(core_schema))


class ShownSlot:
    """Metadata of a field that names an entry of a registry: commands/schema.py makes a choice by name of it.

    optional: null stands for no entry. implied: keys that stand for a name: a mapping that holds one of them needs no
    `name`. default: the entry of a mapping without `name`.
    """

    def __init__(
        self,
        registry: "Registry",
        optional: bool = False,
        implied: Mapping[str, str] | None = None,
        default: str | None = None,
    ) -> None:
        self.registry, self.optional, self.implied, self.default = registry, optional, dict(implied or {}), default

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"x-slot": self}


class Registry:
    """Named implementations of one slot. has_config: false for entries that are all said by their name."""

    every: ClassVar[list["Registry"]] = []

    def __init__(
        self,
        slot_name: str,
        has_config: bool = True,
        filled_by: Sequence[str] = (),
        base: type[Component] = Component,
        noun: str | None = None,
        has_imports: bool = True,
    ) -> None:
        """base: what each entry's `Config` derives from: the fields that others read of any entry of this slot.
        noun: one entry, where the slot's name is a plural. has_imports: whether files that name entries have `imports`.
        filled_by: modules that register entries, imported when the slot is first looked into. So the room of a
        schema need not import the rooms of the components that it names."""
        self.slot_name, self.has_config, self.base = slot_name, has_config, base
        self.noun, self.has_imports = noun or slot_name, has_imports
        self.every.append(self)
        self.loaded: dict[str, Any] = {}
        self._filled_by = tuple(filled_by)

    @property
    def entries(self) -> dict[str, Any]:
        """By name."""
        modules, self._filled_by = self._filled_by, ()
        for module in modules:
            importlib.import_module(module)
        return self.loaded

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator. The entry must carry a `Config` derived from the slot's base.

        Raises ValueError without one, and for a name that is taken.
        """

        def add(entry: T) -> T:
            if name in self.loaded:
                raise ValueError(f"{self.noun} {name!r} is registered twice")
            config = getattr(entry, "Config", None)
            if self.has_config and not (isinstance(config, type) and issubclass(config, self.base)):
                fault = "has no class Config" if config is None else f"has a Config that is no {self.base.__name__}"
                place = f"from {self.base.__module__}"
                raise ValueError(
                    f"{self.noun} {name!r} {fault}: write `class Config({self.base.__name__}):` in it ({place})"
                )
            self.loaded[name] = entry
            return entry

        return add

    def parse(self, node: Any, default: str | None = None) -> Component:
        """Validate a name, or a mapping with `name`, against the entry's own Config. default: the name of a mapping
        without one."""
        if isinstance(node, BaseModel):
            node = node.model_dump()
        if not isinstance(node, dict):
            node = {"name": node}
        if default is not None:
            node = {"name": default, **node}
        if "name" not in node:
            raise ValueError(f"has no name: say which {self.noun}, name: {' | '.join(sorted(self.entries))}")
        return self.known(str(node["name"])).Config.model_validate(node)

    def known(self, name: str) -> Any:
        """The entry. Raises ValueError for a name that there is not."""
        if name not in self.entries:
            hint = "; a part of yours needs its file in imports" if self.has_imports else ""
            raise ValueError(f"unknown {self.noun} {name!r}, {did_you_mean(name, self.entries)}{hint}")
        return self.entries[name]

    def slot(self, optional: bool = False, default: str | None = None) -> tuple[Any, ...]:
        """Annotation metadata for a config field that holds one entry of this registry: `Annotated[Any, *R.slot()]`.

        optional: or null, for none. default: the entry of a mapping without `name`.
        """
        return (
            BeforeValidator(lambda node: None if optional and node is None else self.parse(node, default)),
            PlainSerializer(lambda config: None if config is None else config.model_dump()),
            ShownSlot(self, optional, default=default),
        )

    def build(self, config: Component, **runtime: Any) -> Any:
        """Construct the entry named by `config`; runtime facts (hidden_size, layer_index, ...) are keywords.

        Raises ConfigError, starting with the slot, as check_call.
        """
        with named(self.slot_name):
            self.check_call(config.name, runtime)
        return self.entries[config.name](config, **runtime)

    def check_call(self, name: str, facts: Iterable[str]) -> None:
        """Raise ConfigError, one line, for an entry that cannot be constructed with its config and these facts."""
        entry = self.entries[name]
        if fault := call_fault(entry, ["config"] if self.has_config else [], facts):
            raise ConfigError(f"{name} ({place_of(entry)}): {fault}")


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(value: Any) -> int:
    """A count of tokens or bytes: a plain integer, `1e9`, or a number with K, M, B or T: `1.719T`, `50B`, `300K`."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a count such as 50B, 300K or 1000000, got {value!r}")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(-?[0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([KMBT]?)\s*", value, re.IGNORECASE)
        if match is None:
            raise ValueError(f"expected a count such as 50B, 300K or 1000000, got {value!r}")
        number = float(match[1]) * _UNITS[match[2].upper()]
    else:
        number = value
    if not number < 2**63:
        raise ValueError(f"expected a count under 2^63, got {value!r}")
    if number < 0 or number != round(number):
        raise ValueError(f"expected a whole count, 0 or more, got {value!r}")
    return round(number)


def or_text(pattern: str, example: str) -> Shown:
    """That a field may also hold a text of this pattern."""
    return Shown(lambda node: {"anyOf": [node, {"type": "string", "pattern": pattern, "examples": [example]}]})


_COUNT = r"^\s*[0-9]*\.?[0-9]+([eE][0-9]+)?\s*[KMBTkmbt]?\s*$"
Count = Annotated[int, BeforeValidator(parse_count), or_text(_COUNT, "50B")]


def _one_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError(f"expected one line of characters that can be printed, got {value!r}")
    return value


MAY_CHANGE: JsonDict = {"may_change": True}
"""Field(json_schema_extra=MAY_CHANGE): a run goes on with another value, which changes where things lie, speed or logs,
and neither the weights' history nor any figure."""

# Of names, URLs and patterns that stand in messages.
Line = Annotated[str, AfterValidator(_one_line)]


def expand_user(path: str) -> str:
    """A local path with a leading `~` or `~NAME` replaced by that user's home folder; URLs are left as they are.

    Raises ValueError for a user that is not known here, and for what is too long to name a file.
    """
    if "://" in path:
        return path
    longest = max(len(part.encode(errors="surrogateescape")) for part in path.split("/"))
    if longest > 255 or len(path.encode(errors="surrogateescape")) > 3000:  # of Linux: 255 bytes a name, 4096 a path
        raise ValueError(f"expected a path of names of at most 255 bytes, and 3000 in all, got one of {longest} bytes")
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        user = path.split("/", 1)[0]
        raise ValueError(f"{path!r}: {user} has no home folder here: write ./{user} for a name of that kind") from None


# Of paths of the user's, local ones and URLs.
UserPath = Annotated[str, AfterValidator(_one_line), AfterValidator(expand_user)]


def named_paths(config: Schema) -> dict[str, Path]:
    """What fields of type UserPath name, by their keys, those of sections, lists and mappings among them."""
    found: dict[str, Path] = {}
    for key, field in type(config).model_fields.items():
        names_paths = _is_user_path(field.annotation, field.metadata)
        for place, each in _parts(key, getattr(config, key)):
            if isinstance(each, Schema):
                found |= {f"{place}.{name}": path for name, path in named_paths(each).items()}
            elif isinstance(each, str) and names_paths:
                found[place] = Path(each)
    return found


def _parts(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A value, or those in a list or mapping, however deep, with their places."""
    if isinstance(value, Mapping | list | tuple):
        for key, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _parts(f"{place}.{key}", each)
    else:
        yield place, value


def _is_user_path(annotation: Any, metadata: Iterable[Any] = ()) -> bool:
    own = [*metadata, *getattr(annotation, "__metadata__", ())]
    marked = any(isinstance(each, AfterValidator) and each.func is expand_user for each in own)
    return marked or any(_is_user_path(part) for part in get_args(annotation))


_BYTES = {"": 1} | {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("b", 1000), ("ib", 1024))
    for power, prefix in enumerate(("k", "m", "g", "t"), 1)
}


def parse_size(value: Any) -> int:
    """Bytes: a plain integer, or a number with kb, mb, gb, tb (powers of 1000) or kib, mib, gib, tib (of 1024)."""
    wanted = "expected a size such as 50gb, 512mib or 1000000"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{wanted}, got {value!r}")
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e\+?[0-9]+)?)\s*([kmgt]i?b)?\s*", str(value), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{wanted}, got {value!r}")
    number = float(match[1]) * _BYTES[(match[2] or "").lower()]
    if not math.isfinite(number) or abs(number - round(number)) > 1e-6 * number:
        raise ValueError(f"{wanted}: a whole number of bytes, got {value!r}")
    return round(number)


_SIZE = r"^\s*[0-9]*\.?[0-9]+([eE]\+?[0-9]+)?\s*([kmgtKMGT][iI]?[bB])?\s*$"
Size = Annotated[int, BeforeValidator(parse_size), or_text(_SIZE, "50gb")]


def validate(schema: type[S], node: Any, path: str | Path) -> S:
    """Check a node against a schema. Raises ConfigError with one line per fault: `file: key.path: what is wrong`; of a
    file of another kind with the one line that says so."""
    try:
        return schema.model_validate(node)
    except ValidationError as error:
        if (said := other_kind(schema.__name__, node, Path(path))) is not None:
            raise ConfigError(f"{path}: {said}") from None
        raise ConfigError("\n".join(dict.fromkeys(f"{path}: {line}" for line in explain(error)))) from None


def explain(error: ValidationError) -> list[str]:
    """One line per fault of a ValidationError: `key.path: what is wrong`."""
    lines = []
    for fault in error.errors():
        where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in fault["loc"]).lstrip(".")
        cause = fault.get("ctx", {}).get("error")
        if isinstance(cause, ValidationError):
            lines += [f"{where}.{line}" for line in explain(cause)]
            continue
        message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if fault["type"] == "missing":
            message = "is required and missing"
        elif not isinstance(cause, ValueError):
            message += f", got {fault['input']!r}"
        lines.append(f"{where}: {message}" if where else message)
    return lines
