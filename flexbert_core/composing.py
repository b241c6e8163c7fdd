"""From YAML files, presets and overrides to one mapping of plain values.

Shared by every room, like flexbert_core/schema.py.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import ConfigError, expand_user

# By dotted key, how a short form is written out in full.
Spelled = Mapping[str, Callable[[Any], Any]]


def load_node(
    path: str | Path,
    overrides: Sequence[str] = (),
    expand: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    spelled: Spelled = MappingProxyType({}),
    amend: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Read a YAML file with OmegaConf: `defaults` (files under it), overrides `key.path=value` over it, interpolation.

    All of these are merged as `merge` says. amend: applied to what the file says, before the overrides. expand: applied
    to the result before interpolation (presets).
    Raises ConfigError, one line per fault.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        node = _read_yaml(Path(path), (), spelled)
        if amend is not None:
            node = amend(node)
        given: dict[str, Any] = {}
        for keys, value in _in_order(overrides, path, node):
            nested: Any = value
            for key in reversed(keys):
                nested = {key: nested}
            given = merge(given, nested, spelled)
        node = merge(node, given, spelled)
        if expand is not None:
            node = expand(node)
        whole = OmegaConf.create(node)
        return cast("dict[str, Any]", OmegaConf.to_container(whole, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ConfigError(f"{path}: {where}{str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{path}: sections lie too deep in each other, or in themselves: flatten them") from None


def override(key: str, value: Any) -> str:
    """key=value for `load_node`, of any value that JSON has."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"  # YAML knows no surrogate pairs


def merge(base: Any, over: Any, spelled: Spelled = MappingProxyType({}), place: tuple[str, ...] = ()) -> Any:
    """`over` on top of `base`: mappings key by key, everything else in place of what was there. Changes neither.

    A component (a mapping with `name`) of another name replaces the one below it whole, whose keys mean nothing to it;
    of the same name, or of none, it is merged. A bare NAME is {name: NAME}. A run and its phases have names of their
    own that choose nothing: the rule leaves out the file itself and the entries of its lists.
    spelled: other short forms, by their keys in the file. A mapping over a list changes entries by their numbers.
    """
    spell = spelled.get(".".join(place), lambda node: node)
    if isinstance(over, str):
        return base if isinstance(base, Mapping) and len(place) and base.get("name") == over else over
    if not isinstance(over, Mapping) or base is None:
        return over
    if isinstance(base, list):
        changed = list(base)
        for key, value in over.items():
            if not str(key).removeprefix("-").isdecimal() or not -len(base) <= int(key) < len(base):
                return over  # the schema refuses it
            changed[int(key)] = merge(changed[int(key)], value, spelled, (*place, str(key)))
        return changed
    base, over = (_as_component(spell(node)) for node in (base, over))
    if not isinstance(base, Mapping):
        return over
    has_title = not place or (len(place) == 2 and place[1].removeprefix("-").isdecimal())
    if not has_title and {"name"} <= base.keys() & over.keys() and base["name"] != over["name"]:
        return over
    merged = dict(base)
    for key, value in over.items():
        merged[key] = merge(base.get(key), value, spelled, (*place, str(key)))
    return merged


def leaves(node: Mapping[str, Any], between: str = ".", prefix: str = "") -> dict[str, Any]:
    """What nested mappings hold at their ends, under the keys that lead there, joined: `a.b.c`."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        place = f"{prefix}{between}{key}" if prefix else str(key)
        found |= leaves(value, between, place) if isinstance(value, Mapping) else {place: value}
    return found


def _as_component(node: Any) -> Any:
    return {"name": node} if isinstance(node, str) else node


def _read_yaml(path: Path, parents: tuple[Path, ...], spelled: Spelled) -> Any:
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
    below: Any = {}
    for base in defaults:
        try:
            file = path.parent / expand_user(base)
        except ValueError as error:
            raise ConfigError(f"{path}: defaults: {error}") from None
        below = merge(below, _read_yaml(file, (*parents, path.resolve()), spelled), spelled)
    return merge(below, OmegaConf.to_container(node), spelled)


def _in_order(overrides: Sequence[str], path: str | Path, node: Any) -> list[tuple[list[str], Any]]:
    """Keys and value of each override: whole sections (`model=modernbert-base`) before keys inside them, and of one key
    given twice the last one last. Raises ConfigError for one that is none, or whose key names no entry of a list."""
    parsed = []
    for override in overrides:
        key, value = _parse_override(override)
        keys = re.findall(r"[^.\[\]]+", key)
        _check_entries(path, node, key, keys)
        parsed.append((keys, value))
    return sorted(parsed, key=lambda pair: len(pair[0]))


def _check_entries(path: str | Path, node: Any, key: str, parts: Sequence[str]) -> None:
    """Raise ConfigError, with the entries that there are, where an override's key names none of a list's."""
    for number, part in enumerate(parts):
        if isinstance(node, list):
            if not re.fullmatch(r"-?[0-9]+", part) or not -len(node) <= int(part) < len(node):
                entries = f"only 0 to {len(node) - 1}" if len(node) else "it is empty"
                where = ".".join(parts[:number])
                raise ConfigError(f"{path}: {key}: {where} has no entry {part}, {entries}")
            node = node[int(part)]
        else:
            node = node.get(part) if isinstance(node, dict) else None


def _parse_override(override: str) -> tuple[str, Any]:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[^.\[\]\s]+(\.[^.\[\]\s]+|\[[^.\[\]\s]+\])*", key.strip()):
        raise ConfigError(f"override {override!r}: expected key.path=value")
    try:
        parsed = OmegaConf.from_dotlist([f"value={value}"])
    except YAMLError as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"override {override!r}: not valid YAML: {problem}") from None
    return key.strip(), OmegaConf.to_container(parsed)["value"]  # pyright: ignore
