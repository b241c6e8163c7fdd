"""How the rooms import one another: no circle, with imports for types alone and those inside functions counted."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("main", "commands", "training", "callbacks", "recipe", "data", "flexbert", "ranks", "flexbert_core")


def modules_of(root: Path, rooms: tuple[str, ...]) -> dict[str, Path]:
    """Dotted names and files; a package's own name is that of its __init__.py. A room is a folder or a file."""
    found = {}
    for room in rooms:
        files = [root / f"{room}.py"] if (root / f"{room}.py").is_file() else (root / room).rglob("*.py")
        for file in files:
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports_of(name: str, modules: dict[str, Path]) -> set[str]:
    """The modules among these that this one imports, anywhere in its text. `from a import b` is an import of the module
    a.b where there is one, else of a."""
    file = modules[name]
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= names & modules.keys()
            if names - modules.keys():
                found.add(base)
    return found & modules.keys() - {name}


def circles(modules: dict[str, Path]) -> list[list[str]]:
    """Groups of modules each of which imports, by way of others, all of its group: the strongly connected components of
    more than one (Tarjan, SIAM J. Comput. 1972)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = lowest[name] = len(index)
        stack.append(name)
        for other in sorted(imports_of(name, modules)):
            if other not in index:
                visit(other)
            if other in stack:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(modules):
        if name not in index:
            visit(name)
    return sorted(found)


def test_no_module_imports_itself_by_way_of_others() -> None:
    modules = modules_of(ROOT, ROOMS)
    assert {name.partition(".")[0] for name in modules} == set(ROOMS)
    assert circles(modules) == []


def test_circles_of_every_kind_are_found(tmp_path: Path) -> None:
    texts = {
        "__init__": "from room.one import x",
        "one": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from room.two import y",
        "two": "def f():\n    from room import three",
        "three": "from . import one",
        "inner/__init__": "import room.four",
        "four": "from .inner.five import z",
        "inner/five": "from ..four import w",
        "leaf": "import room.one, json",
    }
    for name, text in texts.items():
        file = tmp_path / "room" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert circles(modules_of(tmp_path, ("room",))) == [
        ["room.four", "room.inner.five"],
        ["room.one", "room.three", "room.two"],
    ]
