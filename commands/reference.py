"""The configuration reference as Markdown: every key of every kind of YAML file, then every slot with its entries."""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from commands.schema import KINDS, MAY_CHANGE, Node, bare_names, presets, read_tree, slots, target
from flexbert.config import FlexBertConfig
from flexbert_core.schema import ShownSlot

_INTRODUCTIONS = {
    "run": "What `main.py train` reads: `configs/*.yaml` and `configs/pretrain/`.",
    "prepare": "What `main.py prepare` reads: `configs/data/`.",
    "model": "A preset in `configs/model/`, or `model:` in a run file.",
    "eval": "What `main.py eval` reads: `configs/eval/`.",
    "sweep": "What `main.py sweep` reads: `configs/sweep/`.",
    "track": "What `main.py speedrun` reads: `configs/speedrun/track-*.yaml`.",
}
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "over {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "under {}",
    "multipleOf": "a multiple of {}",
    "minItems": "{} or more",
    "minProperties": "{} or more",
    "maxItems": "at most {}",
}


class _Row(NamedTuple):
    key: str
    node: Node
    default: str


def markdown() -> str:
    """The whole page."""
    trees = {kind: read_tree(schema) for kind, schema in KINDS.items()}
    lines = [
        "# Configuration reference",
        "",
        "`python main.py schema --markdown` writes this page from the schemas that check the files. "
        "A key that no table has is refused.",
        "",
        "A count is a plain integer, or a number with K, M, B or T behind it: `300K`, `1.719T`. "
        "A size is a number of bytes, or a number with kb, mb, gb or tb (powers of 1000), or kib, mib, gib or tib (of "
        "1024). A slot takes a name (`norm: rmsnorm`), or a mapping with the name and options "
        "(`norm: {name: rmsnorm, eps: 1e-6}`). Every file may name others that it is merged over "
        "(`defaults: base.yaml`), and a value may come from elsewhere (`${seed}`, `${oc.env:HOME}`).",
        "",
    ]
    for kind, schema in KINDS.items():
        lines += [f"## {kind.capitalize()} file", "", _INTRODUCTIONS.get(kind, ""), ""]
        lines += _section(trees[kind], trees[kind][schema.__name__], "", {})
    lines += ["## Slots", "", "Each entry is listed with its own options.", ""]
    known: dict[str, tuple[ShownSlot, dict[str, Node]]] = {}
    for tree in trees.values():
        for slot in slots(tree):
            known.setdefault(slot.registry.slot_name, (slot, tree))
    for name in sorted(known):
        lines += _slot(name, *known[name])
    return "\n".join(lines).rstrip() + "\n"


def _section(tree: dict[str, Node], node: Node, prefix: str, given: dict[str, Any]) -> list[str]:
    """The table of a definition's keys, then its sections. given: defaults that the key above has for it."""
    lines = [_text(node.get("description", "")), ""]
    required = node.get("required", ())
    rows, below = [], []
    for key, value in node["properties"].items():
        default = _default(key, value, given, key in required)
        rows.append(_Row(prefix + key, value, default))
        if (inner := _inner(value)) is not None:
            name, path = inner
            own = given.get(key, value.get("default"))
            below.append((name, f"{prefix}{key}{path}", own if isinstance(own, dict) else {}))
    lines += [*_table(rows, tree), ""]
    for name, path, own in below:
        if name == FlexBertConfig.__name__:
            continue  # a kind of its own
        lines += [f"### `{path}`", "", *_section(tree, tree[name], f"{path}.", own)]
    return lines


def _slot(name: str, slot: ShownSlot, tree: dict[str, Node]) -> list[str]:
    lines = [f"### Slot `{name}`", ""]
    bare = bare_names(slot, tree)
    for entry in sorted(slot.registry.entries):
        node = tree[f"{name}.{entry}"]
        rows = [row for row in _flat_rows(tree, node, "") if row.key != "name"]
        lines += [f"**`{entry}`**: {_text(node['description'])}", ""]
        if entry not in bare:
            lines += ["Its name alone is not enough: it has options that must be given.", ""]
        lines += [*_table(rows, tree), ""] if rows else []
    return lines


def _flat_rows(tree: dict[str, Node], node: Node, prefix: str) -> Iterator[_Row]:
    """The keys of a definition, each followed by those of the section that it holds."""
    for key, value in node["properties"].items():
        yield _Row(prefix + key, value, _default(key, value, {}, key in node.get("required", ())))
        if (inner := _inner(value)) is not None and inner[0] != FlexBertConfig.__name__:
            name, path = inner
            yield from _flat_rows(tree, tree[name], f"{prefix}{key}{path}.")


def _table(rows: list[_Row], tree: dict[str, Node]) -> Iterator[str]:
    yield "| key | holds | default | meaning |"
    yield "|---|---|---|---|"
    for key, node, default in rows:
        meaning = node.get("description", "") + (" (may change on resume)" if node.get(MAY_CHANGE) else "")
        yield f"| `{key}` | {_cell(_holds(node))} | {_cell(default)} | {_cell(meaning)} |"


def _default(key: str, node: Node, given: dict[str, Any], required: bool) -> str:
    if required:
        return "required"
    value = given.get(key, node.get("default", _default))
    if value is _default:
        return "see text"
    if isinstance(value, dict):
        return "as below"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _inner(node: Node) -> tuple[str, str] | None:
    """The definition that a value consists of, and how its keys are reached from the value's: "", "[]" or ".NAME"."""
    if (name := target(node)) is not None:
        return name, ""
    for each in node.get("anyOf", ()):
        if (inner := _inner(each)) is not None:
            return inner
    for key, path in (("items", "[]"), ("additionalProperties", ".NAME")):
        if isinstance(node.get(key), dict) and (inner := _inner(node[key])) is not None:
            return inner[0], path + inner[1]
    return None


def _holds(node: Node) -> str:
    """Type and range of a value, in words."""
    if "x-slot" in node:
        slot: ShownSlot = node["x-slot"]
        name = slot.registry.slot_name
        return f"an entry of [slot `{name}`](#slot-{name.replace(' ', '-')})" + (", or null" if slot.optional else "")
    if (name := target(node)) is not None:
        if name == FlexBertConfig.__name__:
            return f"a [model](#model-file), or a preset: {', '.join(f'`{each}`' for each in presets())}"
        return "a section"
    if "anyOf" in node:
        parts = [_holds(each) for each in node["anyOf"]]
        return _bounded(" or ".join(dict.fromkeys(parts)), node)
    if "const" in node or "enum" in node:
        return ", ".join(f"`{each}`" for each in node.get("enum", [node.get("const")]))
    kind = node.get("type")
    if kind == "string" and "examples" in node:
        return f"text such as `{node['examples'][0]}`"
    if kind == "array":
        return _bounded(f"list of: {_holds(node['items'])}", node)
    if kind == "object":
        inner = node.get("additionalProperties")
        return _bounded(f"names, each with {_holds(inner) if isinstance(inner, dict) else 'a value'}", node)
    if kind == "string" and "pattern" in node:
        return f"text of the form `{node['pattern']}`"
    words = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
    return _bounded(words.get(str(kind), "any value"), node)


def _bounded(words: str, node: Node) -> str:
    bounds = [text.format(_number(node[key])) for key, text in _BOUNDS.items() if key in node]
    return ", ".join([words, *bounds])


def _number(value: Any) -> str:
    power = round(value).bit_length() - 1 if value == round(value) and value > 2**15 else 0
    return f"2^{power}" if power and value == 2**power else f"{value:g}" if isinstance(value, float) else str(value)


def _text(docstring: str) -> str:
    """A docstring's paragraphs, as Markdown."""
    paragraphs = re.split(r"\n\s*\n", docstring.strip())
    return "\n\n".join(" ".join(each.split()).replace("<", "&lt;").replace("*", r"\*") for each in paragraphs)


def _cell(text: str) -> str:
    escaped = " ".join(text.split()).replace("|", r"\|")
    # Outside of code, what Markdown or HTML would read as its own.
    return re.sub(r"(`[^`]*`)|([<*])", lambda found: found[1] or {"<": "&lt;", "*": r"\*"}[found[2]], escaped)
