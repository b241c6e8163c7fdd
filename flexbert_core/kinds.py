"""Which kind of YAML file a file is, by its keys and by its first line: for one that was given to the wrong command."""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

_SCHEMAS = Path(__file__).parent.parent / "configs" / "schema"
_READ_BY = {
    "run": "`main.py train {file}` reads it",
    "prepare": "`main.py prepare {file}` reads it",
    "sweep": "`main.py sweep {file}` reads it",
    "eval": "`main.py eval {file} MODEL` reads it",
    "model": "what it says stands under `model` of a run file",
    "track": "`main.py speedrun verify RUN... --track {file}` reads it",
}
_FIRST_LINE = re.compile(r"#\s*yaml-language-server:\s*\$schema=\S*?(\w+)\.json")


@cache
def _keys() -> dict[str, tuple[str, frozenset[str], frozenset[str]]]:
    """By kind the name of its schema, its keys and the required ones, as configs/schema/ has them. Nothing where that
    is not there, as in the library alone."""
    found = {}
    for kind in _READ_BY:
        file = _SCHEMAS / f"{kind}.json"
        if file.is_file():
            node = json.loads(file.read_text())
            name = node["allOf"][0]["else"]["$ref"].removeprefix("#/$defs/")
            own = node["$defs"][name]
            found[kind] = name, frozenset(own["properties"]), frozenset(own.get("required", ()))
    return found


def other_kind(schema: str, node: Any, path: Path) -> str | None:
    """What to say of a file that is no good as the kind of this schema's name, when it is one of another kind: what it
    is, and what reads it. None: it is of the asked kind, or of none."""
    asked = next((kind for kind, (name, *_) in _keys().items() if name == schema), None)
    if asked is None or not isinstance(node, Mapping) or path.suffix not in (".yaml", ".yml") or not path.is_file():
        return None
    wrong = {kind: _faults(kind, node) for kind in _keys()}
    best = min(wrong, key=lambda kind: wrong[kind])
    # Few keys are of several kinds: then the first line says more.
    said = _said(path)
    if said is not None and wrong[said][0] <= wrong[asked][0]:
        best = said
    elif (wrong[best][0] == wrong[asked][0] and wrong[best][1] > 0) or 2 * wrong[best][1] > len(_keys()[best][2]):
        return None
    if best == asked or wrong[best][0] == len(node):
        return None
    return f"this is a{'n' if best == 'eval' else ''} {best} file: {_READ_BY[best].format(file=path)}"


def _faults(kind: str, node: Mapping[str, Any]) -> tuple[int, int]:
    """How many keys the kind does not have, and how many that it requires are missing."""
    _, known, required = _keys()[kind]
    return len(node.keys() - known), len(required - node.keys())


def _said(path: Path) -> str | None:
    """The kind that the file's first line names."""
    with path.open(encoding="utf-8", errors="replace") as file:
        match = _FIRST_LINE.match(file.readline())
    return match[1] if match and match[1] in _keys() else None
