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
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

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


class RunError(Exception):
    """The run cannot go on (damaged shard, full disk, ...): one line that names what and where. Exit code 1."""


def _printable(line: str) -> str:
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
    return line if len(line) <= 2000 else f"{line[:1200]} ... {line[-780:]}"


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest valid one, or all of them when none is near."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"valid names: {', '.join(valid)}"


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
                raise ValueError("; ".join(f"unknown key {key!r}, {did_you_mean(key, known)}" for key in unknown))
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

    implied: keys that stand for a name: a mapping that holds one of them needs no `name`.
    """

    def __init__(self, registry: "Registry", optional: bool = False, implied: Mapping[str, str] | None = None) -> None:
        self.registry, self.optional, self.implied = registry, optional, dict(implied or {})

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"x-slot": self}


class Registry:
    """Named implementations of one slot."""

    def __init__(self, slot_name: str) -> None:
        self.slot_name = slot_name
        self.entries: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator. The entry must carry a `Config` derived from Component (for a function: set the attribute)."""

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

    def slot(self) -> tuple[Any, ...]:
        """Annotation metadata for a config field that holds one entry of this registry: `Annotated[Any, *R.slot()]`."""
        return BeforeValidator(self.parse), PlainSerializer(lambda config: config.model_dump()), ShownSlot(self)

    def build(self, config: Component, **runtime: Any) -> Any:
        """Construct the entry named by `config`; runtime facts (hidden_size, layer_index, ...) are keywords."""
        return self.entries[config.name](config, **runtime)


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


# Of paths and names that stand in messages.
Line = Annotated[str, AfterValidator(_one_line)]

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


def load_node(
    path: str | Path, overrides: Sequence[str] = (), expand: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
    """Read a YAML file with OmegaConf: `defaults` (files to merge under it), overrides `key.path=value`, interpolation.

    expand: applied to the merged OmegaConf node before the overrides (presets). Raises ConfigError, one line per fault.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        node = _read_yaml(Path(path), ())
        values = [_parse_override(override) for override in overrides]
        # A whole section given by an override (`model=modernbert-base`) counts before the keys inside it.
        for key, value in sorted(values, key=lambda pair: pair[0].count(".")):
            if expand is not None and "." in key:
                node = expand(node)
            _check_entries(path, node, key)
            OmegaConf.update(node, key, value, force_add=True)
        if expand is not None:
            node = expand(node)
        return cast("dict[str, Any]", OmegaConf.to_container(node, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ConfigError(f"{path}: {where}{str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{path}: sections lie too deep in each other, or in themselves: flatten them") from None
    except (TypeError, AttributeError, IndexError, ValueError) as error:  # an override that goes through a plain value
        raise ConfigError(f"{path}: override does not fit the file: {error}") from None


def validate(schema: type[S], node: Any, path: str | Path) -> S:
    """Check a node against a schema. Raises ConfigError with one line per fault: `file: key.path: what is wrong`."""
    try:
        return schema.model_validate(node)
    except ValidationError as error:
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


def _read_yaml(path: Path, parents: tuple[Path, ...]) -> Any:
    """The file merged over its `defaults`. Raises ConfigError for a missing file, a syntax error or a circle."""
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from yaml import MarkedYAMLError, YAMLError

    try:
        there, includes_itself = path.is_file(), path.resolve() in parents
    except (OSError, ValueError) as error:  # a name that no file can have
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if includes_itself:
        raise ConfigError(f"{path}: defaults: the file includes itself")
    if not there:
        siblings = {str(file) for file in path.parent.glob("*.yaml")} if path.parent.is_dir() else set()
        hint = f", {did_you_mean(str(path), siblings)}" if siblings else ""
        raise ConfigError(f"{path}: no such file{hint}")
    try:
        node = OmegaConf.load(path)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except (YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    except OSError as error:
        # OmegaConf raises a bare OSError for a file that holds a plain value
        raise ConfigError(f"{path}: expected a mapping of keys to values ({error})") from None
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of keys to values")
    defaults = node.pop("defaults", [])
    if isinstance(defaults, str):
        defaults = [defaults]
    if not isinstance(defaults, list | ListConfig) or not all(isinstance(base, str) and base for base in defaults):
        raise ConfigError(f"{path}: defaults: expected a file or a list of files, got {defaults!r}")
    bases = [_read_yaml(path.parent / base, (*parents, path.resolve())) for base in defaults]
    return OmegaConf.merge(*bases, node)


def _check_entries(path: str | Path, node: Any, key: str) -> None:
    """Raise ConfigError, with the entries that there are, where an override's key names none of a list's."""
    from omegaconf import DictConfig, ListConfig

    parts = re.findall(r"[^.\[\]]+", key)
    for number, part in enumerate(parts):
        if isinstance(node, ListConfig):
            if not re.fullmatch(r"-?[0-9]+", part) or not -len(node) <= int(part) < len(node):
                entries = f"only 0 to {len(node) - 1}" if len(node) else "it is empty"
                where = ".".join(parts[:number])
                raise ConfigError(f"{path}: {key}: {where} has no entry {part}, {entries}")
            node = node[int(part)]
        else:
            node = node.get(part) if isinstance(node, DictConfig) else None


def _parse_override(override: str) -> tuple[str, Any]:
    from omegaconf import OmegaConf

    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r}: expected key.path=value")
    parsed = OmegaConf.from_dotlist([f"value={value}"])
    return key.strip(), OmegaConf.to_container(parsed)["value"]  # pyright: ignore
