"""Parts from outside FlexBERT: the files that a model needs of them, in an export and back from one.

A part may import FlexBERT's library, what pip has installed, and files that lie beside its own. These travel, too.
"""

import ast
import functools
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flexbert.config import FlexBertConfig
from flexbert.hf.carried_modules import CarriedModules
from flexbert.registry import ACTIVATION, ACTIVATIONS, INITS, LOSSES, ModelSlot
from flexbert_core.schema import Component, ConfigError, ShownSlot

_HERE = Path(__file__).parent
LIBRARY: tuple[str, ...] = ("flexbert", "flexbert_core")
SOURCES_FILE = "flexbert_sources.py"
# What an export with parts has in common with every other, and what it needs besides.
MODELING_FILES = ("modeling_flexbert.py", "activations.py")
WITH_PARTS_FILES = ("modeling_with_parts.py", "carried_modules.py")
# Packages that every export with parts needs.
_NEEDED = {"torch", "transformers", "pydantic", "numpy", "safetensors"}


class Parts(NamedTuple):
    """What an export carries of a model's parts from outside."""

    files: dict[str, str]  # path, as the files are imported -> text
    roots: list[str]  # of these, those that register the parts
    importable: list[str]  # the first names of modules by which they import one another
    packages: list[str]  # what they import besides and pip has installed
    places: dict[str, str]  # where in the model -> the file of the part there

    def digests(self) -> dict[str, str]:
        """sha256 of each file."""
        return {path: digest(text) for path, text in self.files.items()}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _named(component: Any, place: str = "") -> Iterator[tuple[str, ModelSlot, str]]:
    """Where a config names a part: place, slot and name."""
    for field, info in type(component).model_fields.items():
        value, where = getattr(component, field), f"{place}.{field}".lstrip(".")
        slot: Any = next((each.registry for each in info.metadata if isinstance(each, ShownSlot)), None)
        if isinstance(slot, ModelSlot) and isinstance(value, Component):
            yield where, slot, value.name
        elif ACTIVATION in info.metadata:
            yield where, ACTIVATIONS, value
        if hasattr(type(value), "model_fields"):
            yield from _named(value, where)


def outside(config: FlexBertConfig) -> dict[str, str]:
    """Where the model has parts from outside -> the module that registered it. Losses and starting weights are none of
    what trained weights compute."""
    found = {}
    for place, slot, name in _named(config):
        module = slot.registered_by.get(name, "")
        if slot not in (LOSSES, INITS) and module.partition(".")[0] != LIBRARY[0]:
            found[f"{place}: {name!r}"] = module
    return found


def parts_of(config: FlexBertConfig) -> Parts:
    """The files to carry. Raises ConfigError, one line, for a part that cannot travel: of no file, or with imports that
    an export cannot give it."""
    parts = Parts({}, [], [], [], {})
    packages: set[str] = set()
    importable = {*LIBRARY}
    for place, name in outside(config).items():
        module: Any = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        if name == "__main__" or file is None or Path(file).suffix != ".py":
            raise ConfigError(
                f"{place} is in no export: it was registered by {name}: put it into a file and import that"
            )
        dotted, file = name.split("."), Path(file)
        if file.stem == "__init__":
            dotted.append("__init__")
        if file.with_suffix("").parts[-len(dotted) :] != tuple(dotted):  # `imports:` of a run file, which has no name
            dotted = [file.stem]
        else:
            importable.add(dotted[0])
        path = "/".join(dotted) + ".py"
        parts.places[place] = path
        if path not in parts.roots:
            parts.roots.append(path)
            _collect(file, path, ".".join(dotted), place, parts.files, importable, packages)
    taken = {*MODELING_FILES, *WITH_PARTS_FILES, SOURCES_FILE, *(f"{name}.py" for name in LIBRARY)}
    for path in parts.files:
        if path in taken or path.partition("/")[0] in LIBRARY:
            raise ConfigError(f"{path}: is the name of a file of every export: rename it")
    return parts._replace(importable=sorted(importable), packages=sorted(packages - _NEEDED))


def _collect(
    file: Path, path: str, module: str, place: str, files: dict[str, str], importable: set[str], packages: set[str]
) -> None:
    """Add the file and those beside it that it imports."""
    where = f"{place} is in no export: {file}"
    text = _text(file)
    if files.setdefault(path, text) != text:
        raise ConfigError(f"{where}: has the name of the file of another part: rename one")
    try:
        tree = ast.parse(text.encode())
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None
    for name, may_lack in _imports(tree.body, module.rpartition(".")[0]):
        first = name.partition(".")[0]
        if first in sys.stdlib_module_names or (first in LIBRARY and not name.startswith("flexbert.hf")):
            continue
        origin = _origin(name)
        if origin is None:
            if not may_lack:
                raise ConfigError(f"{where} imports {name}, which is not found: install it, or put it beside that file")
        elif origin.is_dir():
            continue
        elif "site-packages" in origin.parts or "dist-packages" in origin.parts:
            if not may_lack:
                packages.add(first)
        elif origin.suffix != ".py" or origin.parent != file.parent:
            raise ConfigError(f"{where} imports {name} ({origin}): only .py files beside it travel")
        else:
            other = name.replace(".", "/") + ("/__init__.py" if origin.stem == "__init__" else ".py")
            importable.add(first)
            if other not in files:
                inside = f"{name}.__init__" if origin.stem == "__init__" else name
                _collect(origin, other, inside, place, files, importable, packages)


@functools.cache
def _text(file: Path) -> str:
    """As it was when it was first asked for: a run asks when it starts, and may end after the file was edited."""
    try:
        return file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None


def _imports(nodes: Iterable[ast.AST], package: str, may_lack: bool = False) -> Iterator[tuple[str, bool]]:
    """Dotted names that statements import, and whether the module does without, in a `try`. What is for type checkers
    alone is left out."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((name, may_lack) for alias in node.names for name in _with_packages(alias.name))
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            yield from ((name, may_lack) for name in _with_packages(base))
            yield from ((f"{base}.{alias.name}", True) for alias in node.names if _is_package(base))
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from _imports(node.orelse, package, may_lack)
        else:
            yield from _imports(ast.iter_child_nodes(node), package, may_lack or isinstance(node, ast.Try))


def _with_packages(name: str) -> Iterator[str]:
    """a.b.c, a.b, a: an import of the first runs all."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(len(parts), 0, -1))


def _spec(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None


def _is_package(name: str) -> bool:
    return getattr(_spec(name), "submodule_search_locations", None) is not None


def _origin(name: str) -> Path | None:
    """The file of a module; of a folder without __init__.py, the folder itself."""
    spec = _spec(name)
    if spec is None:
        return None
    if spec.has_location:
        return Path(spec.origin)
    return Path(next(iter(spec.submodule_search_locations or ()), spec.origin or "."))


def write(parts: Parts, folder: Path) -> None:
    """The parts' files, to be read, and all texts in one module, which transformers copies and runs."""
    for path, text in parts.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(text.encode())
    package = _HERE.parent
    files = [file for file in package.rglob("*.py") if _HERE not in file.parents]
    files += (package.parent / LIBRARY[1]).glob("*.py")
    library = {file.relative_to(package.parent).as_posix(): file.read_text(encoding="utf-8") for file in sorted(files)}
    lines = [
        '"""What modeling_with_parts.py runs: the parts of this model from outside FlexBERT, and FlexBERT\'s library.',
        "",
        "Written by flexbert.to_hf. config.json has the sha256 of each part under `parts`. Of the library: Apache-2.0.",
        '"""',
        "",
        *(f"import {name}  # noqa: F401 (a part needs it)" for name in parts.packages),
        f"ROOTS = {parts.roots!r}",
        f"IMPORTABLE = {parts.importable!r}",
        *_mapping("PARTS", parts.files),
        *_mapping("SOURCES", library),
    ]
    (folder / SOURCES_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    written = _read(folder)
    assert (written["PARTS"], written["SOURCES"]) == (parts.files, library)


def _mapping(name: str, texts: dict[str, str]) -> Iterator[str]:
    yield f"{name} = {{}}"
    for path, text in texts.items():
        quoted = text.replace("\\", "\\\\").replace("'''", "\\'\\'\\'").replace("\ufeff", "\\ufeff")
        quoted = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]|'\Z", lambda found: f"\\x{ord(found[0]):02x}", quoted)
        # transformers looks for the files of relative imports by the look of a line.
        quoted = re.sub(r"(?m)^(\s*(?:from|import)\s+)\.", r"\1\\x2e", quoted)
        yield f"{name}[{path!r}] = '''\\\n{quoted}'''"


def _read(folder: Path) -> dict[str, Any]:
    """The values that the module of all texts has, without running it."""
    found: dict[str, Any] = {}
    for node in ast.parse((folder / SOURCES_FILE).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            (target,), value = node.targets, ast.literal_eval(node.value)
            if isinstance(target, ast.Subscript):
                found[ast.unparse(target.value)][ast.literal_eval(target.slice)] = value
            else:
                found[ast.unparse(target)] = value
    return found


def read(folder: Path, expected: dict[str, str]) -> Parts:
    """The parts of an export, not run. expected: sha256 of each file, from config.json. Raises ConfigError for a file
    that is missing or another one."""
    try:
        values = _read(folder)
        texts, roots, importable = values["PARTS"], values["ROOTS"], values["IMPORTABLE"]
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{SOURCES_FILE}: cannot be read: {error}") from None
    names = [*roots, *importable] if isinstance(roots, list) and isinstance(importable, list) else [None]
    whole = isinstance(texts, dict) and all(isinstance(each, str) for each in (*texts, *texts.values(), *names))
    if not whole or not texts.keys() >= set(roots):
        raise ConfigError(f"{SOURCES_FILE}: damaged: take another copy of the export")
    for path in sorted({*texts, *expected}):
        beside = folder / path
        said = {SOURCES_FILE: digest(texts[path]) if path in texts else None}
        if beside.is_file():  # its bytes: a text that is not UTF-8 could be taken for another
            said[path] = hashlib.sha256(beside.read_bytes()).hexdigest()
        for file, found in said.items():
            if found is None or found != expected.get(path):
                raise ConfigError(f"{file}: its {path} is not the one that config.json has the sha256 of: not run")
    return Parts(texts, roots, importable, [], {})


def register(parts: Parts, folder: Path) -> None:
    """Run the parts' files, which registers them here. Those of which the same text has run already are not run again.
    Raises ConfigError for a name that another part has."""
    known = {digest(text) for text in _registered().values()}
    importable = set(parts.importable) - set(LIBRARY)
    carried = CarriedModules(parts.files, importable, folder)
    for path in parts.roots:
        if digest(parts.files[path]) in known:
            continue
        try:
            carried.load(path)
        except Exception as error:  # any code can raise anything
            said = " ".join(str(error).split())
            raise ConfigError(f"{path}: {type(error).__name__}: {said}") from error


def registered_otherwise(expected: dict[str, str]) -> list[str]:
    """Files of parts registered here that have the name, and not the text, of a part of an export."""
    names = {Path(path).name: value for path, value in expected.items()}
    texts = _registered()
    return [file for file, text in texts.items() if digest(text) != names.get(Path(file).name, digest(text))]


def _registered() -> dict[str, str]:
    """The files that have registered parts from outside here, and their texts."""
    from flexbert.registry import SLOTS

    modules = {module for slot in SLOTS.values() for module in slot.registered_by.values()}
    found = {}
    for name in sorted(modules):
        module = sys.modules.get(name)
        if name.partition(".")[0] == LIBRARY[0] or module is None:
            continue
        loader, file = getattr(module, "__loader__", None), getattr(module, "__file__", None)
        if isinstance(loader, CarriedModules):
            found[str(file)] = loader.get_source(name)
        elif file is not None and Path(file).is_file():
            found[str(file)] = _text(Path(file))
    return found


def card(parts: Parts) -> str:
    """What README.md says of the parts."""
    rows = "\n".join(f"| {path} | {value} |" for path, value in parts.digests().items())
    places = "\n".join(f"- {place}, of {path}" for place, path in parts.places.items())
    needs = ", ".join(("torch", "transformers", "pydantic", *parts.packages))
    return f"""
## Code from outside FlexBERT

This model has parts that are not FlexBERT's:

{places}

Their files are in this folder, and their texts in `{SOURCES_FILE}`, which `trust_remote_code=True` runs. They need
{needs}.

| file | sha256 |
|---|---|
{rows}
"""
