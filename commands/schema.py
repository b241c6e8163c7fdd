"""`main.py schema`: every key of every kind of YAML file, from the pydantic schemas, as JSON Schemas or as Markdown.

A kind's tree is a set of definitions by name. Each is pydantic's JSON Schema of one class, without titles; the Config
of a registry's entry is named `slot.entry`. A field that names an entry holds {"x-slot": ShownSlot}. The JSON Schemas
follow from the tree (below), and so do the tables of `commands/reference.py`.

YAML files are not always whole, so a definition comes in up to three forms:

- full: required keys are there, and a component is one that this project has.
- partial (`NAME.partial`), for what is merged over something: a file with `defaults`, a model with `preset`. Nothing is
  required, not even the name of a component.
- open (`NAME.open`), for run files with `imports`, or with `defaults` that may have them: partial, and a component may
  have a name that only the imported file knows.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from data.preparation.config import PrepareConfig
from evals.interface import EvalFile
from flexbert.config import PRESETS, FlexBertConfig
from flexbert_core.schema import ShownSlot
from recipe.config import RunConfig
from recipe.source_model import NAME as SOURCE
from recipe.track import Track
from sweeps.file import SweepFile

# A new kind of file is one line here. Its JSON Schema is FOLDER/KIND.json, which the files name in their first line.
KINDS: dict[str, type[BaseModel]] = {
    "run": RunConfig,
    "prepare": PrepareConfig,
    "model": FlexBertConfig,
    "eval": EvalFile,
    "sweep": SweepFile,
    "track": Track,
}
FOLDER = Path("configs/schema")

Node = dict[str, Any]
MAY_CHANGE = "may_change"
"""Key of a node whose value may differ when a run goes on, as the field's json_schema_extra says."""
_INTERPOLATION = {"$ref": "#/$defs/interpolation"}


def as_lines(schema: Node) -> str:
    """As JSON with a line for each definition, so that a difference shows which one changed."""
    definitions = schema["$defs"].items()
    inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(each)}" for name, each in definitions)
    head = json.dumps({key: value for key, value in schema.items() if key != "$defs"}, indent=1)
    return f'{head[:-2]},\n "$defs": {{\n{inner}\n }}\n}}\n'


def read_tree(schema: type[BaseModel]) -> dict[str, Node]:
    """The definitions that a schema consists of, by name; the first is its own."""
    tree: dict[str, Node] = {}
    _add(tree, schema.__name__, schema)
    return tree


def _add(tree: dict[str, Node], name: str, schema: type[BaseModel]) -> None:
    node = schema.model_json_schema()
    inner = node.pop("$defs", {})
    tree[name] = _plain(node)
    for key, each in inner.items():
        each = _plain(each)
        assert tree.setdefault(key, each) == each, f"two schemas are called {key}: rename one"
    for slot in {id(slot): slot for each in (node, *inner.values()) for slot in slots(each)}.values():
        for entry, component in slot.registry.entries.items():
            if (title := f"{slot.registry.slot_name}.{entry}") not in tree:
                _add(tree, title, component.Config)
                _name_entry(tree[title], entry, component)


def _name_entry(node: Node, entry: str, component: Any) -> None:
    """An entry's Config does not know its name, and its entry is what has the docstring."""
    properties = node["properties"]
    properties["name"] = {"const": entry, "description": "which entry of the slot"}
    node["required"] = ["name", *(key for key in node.get("required", ()) if key != "name")]
    node["description"] = (component.__doc__ or "").strip()


# What pydantic calls bounds where a union stands between them and their number.
_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}


def _plain(node: Any) -> Any:
    """Without the titles that pydantic makes of names; keys called `title` stay."""
    if isinstance(node, dict):
        return {
            _BOUNDS.get(key, key): {name: _plain(each) for name, each in value.items()}
            if key == "properties"
            else _plain(value)
            for key, value in node.items()
            if not (key == "title" and isinstance(value, str))
        }
    return [_plain(each) for each in node] if isinstance(node, list) else node


def slots(node: Any) -> Iterator[ShownSlot]:
    """The slots that a node names, at any depth."""
    if isinstance(node, dict):
        if "x-slot" in node:
            yield node["x-slot"]
        for each in node.values():
            yield from slots(each)
    elif isinstance(node, list):
        for each in node:
            yield from slots(each)


def target(node: Node) -> str | None:
    """The definition that a node refers to."""
    return node["$ref"].removeprefix("#/$defs/") if "$ref" in node else None


def bare_names(slot: ShownSlot, tree: dict[str, Node]) -> list[str]:
    """Entries whose name alone is enough, since they need no option."""
    name = slot.registry.slot_name
    return sorted(entry for entry in slot.registry.entries if tree[f"{name}.{entry}"]["required"] == ["name"])


def presets() -> list[str]:
    """Names of the models in configs/model."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def json_schema(kind: str) -> Node:
    """The JSON Schema (draft 7, which editors know best) of one kind of YAML file."""
    root = KINDS[kind]
    tree = read_tree(root)
    own = tree[root.__name__]
    own["properties"]["defaults"] = {
        "description": "a YAML file, or several, that this one is merged over; relative to this file",
        "anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string", "minLength": 1}}],
    }
    importing = "imports" in own["properties"]
    build = _Builder(tree, root.__name__)
    keys = ("defaults", "imports") if importing else ("defaults",)
    choice = {
        "if": {"anyOf": [{"required": [key]} for key in keys]},
        "then": build.reference(root.__name__, "open" if importing else "partial"),
        "else": build.reference(root.__name__, ""),
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": f"FlexBERT: {kind} file",
        "$comment": "Generated by `python main.py schema --json`; do not edit.",
        "type": "object",
        "allOf": [choice],
        "$defs": build.definitions(),
    }


class _Builder:
    """Writes the forms of definitions that are asked for. A form is "", "partial" or "open"."""

    def __init__(self, tree: dict[str, Node], root: str) -> None:
        self.tree, self.root = tree, root
        self._wanted: dict[str, tuple[str, str]] = {}

    def reference(self, name: str, form: str) -> Node:
        title = f"{name}.{form}" if form else name
        self._wanted.setdefault(title, (name, form))
        return {"$ref": f"#/$defs/{title}"}

    def definitions(self) -> Node:
        """All forms that were asked for, and those that they ask for."""
        written: Node = {
            "interpolation": {
                "type": "string",
                "pattern": r"\$\{.+\}",
                "description": "a value from elsewhere: ${key.path}, or ${oc.env:NAME}",
            }
        }
        while missing := [title for title in self._wanted if title not in written]:
            for title in missing:
                name, form = self._wanted[title]
                written[title] = self._node(self.tree[name], form, top=True)
        return dict(sorted(written.items()))

    def _node(self, node: Any, form: str, top: bool = False) -> Any:
        if isinstance(node, list):
            return [self._node(each, form) for each in node]
        if not isinstance(node, dict):
            return node
        if "x-slot" in node:
            choice = {"anyOf": list(self._choices(node["x-slot"], form))}
            return choice | {key: value for key, value in node.items() if key != "x-slot"}
        if node.get("x-open"):  # names without options; imported files may add to them
            names = {key: value for key, value in node.items() if key != "x-open"}
            return {"anyOf": [names, {"type": "string"}]} if form == "open" else names
        if (name := target(node)) is not None:
            if name == FlexBertConfig.__name__ and self.root != name:
                return {"anyOf": self._models(form)}
            return self.reference(name, form)
        built = {}
        for key, value in node.items():
            if key == "properties":
                built[key] = {name: self._value(each, form) for name, each in value.items()}
            elif key in ("items", "additionalProperties") and isinstance(value, dict):
                built[key] = self._value(value, form)
            elif key in ("default", "const", "enum"):
                built[key] = value
            elif not (top and form and key == "required"):
                built[key] = self._node(value, form)
        return built

    def _value(self, node: Node, form: str) -> Node:
        """What may stand behind a key: also an interpolation."""
        told = {key: node[key] for key in ("description", "default") if key in node}
        built = self._node({key: value for key, value in node.items() if key not in (*told, MAY_CHANGE)}, form)
        if built == {"type": "string"} or "const" in built:
            return built | told
        choices = built["anyOf"] if set(built) == {"anyOf"} else [built]
        return {**told, "anyOf": [*choices, _INTERPOLATION]}

    def _choices(self, slot: ShownSlot, form: str) -> Iterable[Node]:
        """A name, or a mapping with the options of the entry that it names."""
        name, entries = slot.registry.slot_name, slot.registry.entries
        if slot.optional:
            yield {"type": "null"}
        for entry in bare_names(slot, self.tree):
            told = self.tree[f"{name}.{entry}"]["description"].split("\n\n")[0]
            yield {"const": entry, "description": " ".join(told.split())}
        for entry in sorted(entries):
            yield self.reference(f"{name}.{entry}", form)
        if slot.default is not None:
            yield self.reference(f"{name}.{slot.default}", "partial")
        for key, entry in slot.implied.items():
            yield {"allOf": [self.reference(f"{name}.{entry}", "partial"), {"required": [key]}]}
        if form == "open":
            foreign = {"type": "string", "not": {"enum": sorted(entries)}}
            yield foreign
            yield {"type": "object", "properties": {"name": foreign}, "required": ["name"]}

    def _models(self, form: str) -> list[Node]:
        """A preset's name, a preset with changes, or a whole model."""
        changed = f"{FlexBertConfig.__name__}.preset"
        told = "a preset: configs/model/NAME.yaml; from: as the Hugging Face folder that the run's `from` names"
        names = {"enum": [*presets(), SOURCE], "description": told}
        if changed not in self.tree:
            own = self.tree[FlexBertConfig.__name__]
            self.tree[changed] = {**own, "properties": {"preset": names, **own["properties"]}}
        with_preset = {"allOf": [self.reference(changed, form or "partial"), {"required": ["preset"]}]}
        return [names, with_preset, self.reference(FlexBertConfig.__name__, form)]
