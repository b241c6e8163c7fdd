"""How the rooms import one another: no circle, with imports for types alone and those inside functions counted. Tests import
helpers, no tests, and know no private name of a room."""

import ast
import re
import warnings
from pathlib import Path

import pytest

from tests.helpers.ranks import our_modules

ROOT = Path(__file__).parent.parent
ROOMS = ("main", "commands", "sweeps", "training", "callbacks", "recipe", "data", "flexbert", "ranks", "flexbert_core")


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


def imported_tests(modules: dict[str, Path]) -> list[str]:
    """Where a module imports a file of tests or of fixtures, from which pytest alone takes what it runs."""
    return [
        f"{name} imports {other}"
        for name in sorted(modules)
        for other in sorted(imports_of(name, modules))
        if other.rpartition(".")[2].startswith("test_") or other.rpartition(".")[2] == "conftest"
    ]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_names(modules: dict[str, Path]) -> set[str]:
    """Functions, classes, variables and attributes with a leading underscore that these modules define."""
    nodes = [node for file in modules.values() for node in ast.walk(ast.parse(file.read_text()))]
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    return {name for name in names if is_private(name)}


def private_uses(file: Path, private: set[str]) -> list[str]:
    """What a file imports, reads, sets or patches of these names. Its own objects' (`self._x`) are its own."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            names = [node.attr]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "setattr",
            "getattr",
            "delattr",
        ):
            given = [each.value for each in node.args if isinstance(each, ast.Constant)]
            names = [each.rpartition(".")[2] for each in given if isinstance(each, str)]
        else:
            continue
        found += [f"{file.name}:{node.lineno}: {name}" for name in names if name in private]
    return found


def test_tests_import_helpers_and_no_tests() -> None:
    assert imported_tests(modules_of(ROOT, ("tests",))) == []


def test_tests_know_no_private_names_of_the_rooms() -> None:
    private = private_names(modules_of(ROOT, (*ROOMS, "benchmarks")))
    assert "_Config" in private
    assert [use for file in sorted((ROOT / "tests").rglob("*.py")) for use in private_uses(file, private)] == []


def test_imports_of_tests_and_private_names_are_found(tmp_path: Path) -> None:
    texts = {
        "tests/test_one": "from tests.room.test_two import data",
        "tests/room/test_two": "def f():\n    import tests.conftest",
        "tests/room/test_three": "from tests.room import test_two, helper",
        "tests/conftest": "from tests.room.helper import _own",
        "tests/room/helper": "import tests.room.latest_news",
        "tests/room/latest_news": "_own = 3",
    }
    for name, text in texts.items():
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert imported_tests(modules_of(tmp_path, ("tests",))) == [
        "tests.room.test_three imports tests.room.test_two",
        "tests.room.test_two imports tests.conftest",
        "tests.test_one imports tests.room.test_two",
    ]
    room, test = tmp_path / "room.py", tmp_path / "test_private.py"
    room.write_text(
        "_LIMIT, open_limit = 3, 4\ndef _cut(): ...\nclass _Reader:\n    def __init__(self):\n        self._open = 1"
    )
    private = private_names({"room": room})
    assert private == {"_LIMIT", "_cut", "_Reader", "_open"}
    test.write_text(
        "import os, room\nfrom room import _cut, open_limit\nroom._LIMIT\nroom.reader()._open = 2\n"
        "def f(self, patch):\n    patch.setattr('room._LIMIT', 1)\n    patch.setattr(room, '_cut', 1)\n"
        "    self._open = 3\n    os._exit(1)\n    _LIMIT = 1\n    return getattr(room, '_Reader'), '_cut'\n"
    )
    uses = ["2: _cut", "3: _LIMIT", "4: _open", "6: _LIMIT", "7: _cut", "11: _Reader"]
    assert sorted(private_uses(test, private)) == sorted(f"test_private.py:{use}" for use in uses)


def test_files_of_tests_are_short() -> None:
    lengths = {file: len(file.read_text().splitlines()) for file in (ROOT / "tests").rglob("*.py")}
    assert {str(file.relative_to(ROOT)): length for file, length in lengths.items() if length > 400} == {}


def test_warnings_of_our_modules_are_errors() -> None:
    """Of each room, also while a run silences those of libraries."""
    from training.trainer import quiet_libraries

    assert all(re.match(our_modules(), name) for name in (*ROOMS, "tests", "data.feed.loader"))
    assert not any(re.match(our_modules(), name) for name in ("datasets", "torch", "mainly", "database.flexbert"))
    with pytest.raises(UserWarning, match="of a test"):
        warnings.warn("of a test", stacklevel=1)
    quiet_libraries()
    for room in ROOMS:
        with pytest.raises(FutureWarning, match="of a room"):
            warnings.warn_explicit("of a room", FutureWarning, "room.py", 1, module=f"{room}.module")
    for library in ("torch.nn", "datasets", "recipes"):
        warnings.warn_explicit("of a library", FutureWarning, "library.py", 1, module=library)


COLLECTIVES = [
    "all_reduce",
    "broadcast",
    "broadcast_object_list",
    "all_gather",
    "all_gather_object",
    "all_gather_into_tensor",
    "gather",
    "scatter",
    "gather_object",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all",
    "barrier",
    "monitored_barrier",
    "new_group",
]


def test_every_collective_of_ours_is_in_one_module() -> None:
    """So each runs on the device that the process group wants: NCCL has none for tensors on the CPU."""
    found = []
    for name, file in modules_of(ROOT, ROOMS).items():
        for node in ast.walk(ast.parse(file.read_text())):
            if name != "ranks" and isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                if node.func.attr in COLLECTIVES and owner.split(".")[-1] in ("dist", "distributed"):
                    found.append(f"{name}: {owner}.{node.func.attr}")
    assert found == []
