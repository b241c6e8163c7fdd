"""The embedded corpus: real text that every install holds, so that a first run needs neither download nor network."""

import ast
import gc
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from data.preparation.sources.base import SOURCES, Listing, Unit, read_bytes
from data.preparation.sources.files import Fault
from data.preparation.sources.kinds import suffix_of
from flexbert_core.schema import Component, ConfigError, RunError

_ROOTS = {
    "stdlib": Path(sysconfig.get_path("stdlib")),
    "site-packages": Path(sysconfig.get_path("purelib")),
    "share-doc": Path("/usr/share/doc"),  # Debian and its kin; where it is missing, the corpus is smaller
}
# Requirements of this project whose docstrings are prose with examples.
_DOCUMENTED = ("numpy", "pandas", "matplotlib", "networkx")
_TOPICS = "stdlib/pydoc_data/topics.py"
_DOCS = (
    "LICENSE",
    "LICENCE",
    "COPYING",
    "NOTICE",
    "AUTHORS",
    "METADATA",
    "README",
    "CONTRIBUTING",
    "NEWS",
    "copyright",
)
_MIN_BYTES, _MAX_BYTES, _MAX_FILE_BYTES = 256, 100_000, 800_000


@SOURCES.register("builtin")
class Builtin:
    """Text of the Python installation itself.

    Parts: `stdlib-code` (the standard library's source, with its tests), `python-docs` (the topics of the language
    reference; the docstrings of a module as one document), `packages-docs` (readmes, licences and metadata of the
    installed packages and of the system's). Tables of numbers, encoded data and the like are left
    out. What it gives depends on what is installed: it is for trying things out.
    """

    class Config(Component):
        name: Literal["builtin"] = "builtin"
        part: Literal["stdlib-code", "python-docs", "packages-docs"]
        """Which text: Python's own source, its documentation, or what comes with installed packages."""

    def __init__(self, config: Config) -> None:
        self.part = config.part

    def find(self) -> Listing:
        """Unit paths are relative to the installation's roots: no absolute path gets into the output.

        No file is recorded as what a dataset is made from: an installation may change, this corpus is for trying out.
        """
        left_out = Counter[str]()
        if self.part == "stdlib-code":
            units = _list("stdlib", [".py"], left_out)
        elif self.part == "python-docs":
            units = _list("stdlib", [".py"], left_out, ["test", "tests", "idle_test"])
            for package in _DOCUMENTED:
                units += _list(f"site-packages/{package}", [".py"], left_out, ["tests"])
        else:
            units = _list("site-packages", [""], left_out) + _list("share-doc", [""], left_out)
            left_out["no documentation"] = sum(not _is_documentation(unit.path) for unit in units)
            units = [unit for unit in units if _is_documentation(unit.path)]
        if not units:
            raise ConfigError(f"part: this Python installation holds no {self.part} (looked in {_ROOTS['stdlib']})")
        sized = [unit for unit in units if _MIN_BYTES <= unit.bytes <= _MAX_FILE_BYTES]
        left_out["too short or too long"] = len(units) - len(sized)
        return Listing(sized, [], +left_out, [])

    def read(self, unit: Unit) -> Iterator[str | Fault]:
        try:
            text = read_bytes(str(_absolute(unit.path))).decode("utf-8")
        except UnicodeDecodeError:
            yield Fault("not UTF-8")
            return
        if self.part == "python-docs":
            texts = _topics(text) if unit.path == _TOPICS else [_docstrings(text)]
        else:
            texts = [text]
        yield from (text if is_readable(text) else Fault("no prose or code") for text in texts)


def is_readable(text: str) -> bool:
    """Whether a text is worth learning from: no table of numbers, no encoded data, not too short or long."""
    content = np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
    if not _MIN_BYTES <= len(content) <= _MAX_BYTES:
        return False
    letters, digits, blanks = (
        np.count_nonzero(table[content]) / len(content) for table in (_LETTERS, _DIGITS, _BLANKS)
    )
    longest_word = int(np.diff(np.flatnonzero(_BLANKS[content]), prepend=-1, append=len(content)).max())
    return 0 not in content[:4096] and letters > 0.5 and digits < 0.12 and blanks > 0.08 and longest_word < 400


def _table(characters: bytes) -> np.ndarray:
    table = np.zeros(256, bool)
    table[np.frombuffer(characters, np.uint8)] = True
    return table


_DIGITS, _BLANKS = _table(b"0123456789"), _table(b" \t\r\n\f")
_LETTERS = _table(bytes(byte for byte in range(256) if byte >= 128 or chr(byte).isalpha()))


def _absolute(path: str) -> Path:
    root, _, rest = path.partition("/")
    return _ROOTS[root] / rest


def _list(folder: str, suffixes: list[str], left_out: Counter[str], ignore_dirs: list[str] | None = None) -> list[Unit]:
    """Units below a folder, whose links are not followed: an installation may lack what they lead to."""
    base = _absolute(folder)
    ignore = ["__pycache__", "site-packages", "dist-packages", *(ignore_dirs or [])]
    sizes: dict[str, int] = {}
    for where, folders, names in os.walk(base, onerror=lambda _: left_out.update(["folder that cannot be read"])):
        below = [name for name in folders if name not in ignore and not name.startswith(".")]
        left_out["ignored or hidden folder"] += len(folders) - len(below)
        folders[:] = below
        for name in names:
            path = os.path.join(where, name)  # noqa: PTH118 (a string)
            if name.startswith(".") or not name.endswith(tuple(suffixes)):
                left_out["hidden file" if name.startswith(".") else suffix_of(name)] += 1
            elif os.path.isfile(path) and os.access(path, os.R_OK):  # noqa: PTH113
                sizes[folder + path[len(str(base)) :].replace(os.sep, "/")] = os.path.getsize(path)  # noqa: PTH202
            else:
                left_out["file that cannot be read"] += 1
    return [Unit(path, 0, sizes[path], sizes[path]) for path in sorted(sizes)]


def _is_documentation(path: str) -> bool:
    name = path.rpartition("/")[2].removesuffix(".gz")
    return name.endswith((".md", ".rst", ".txt")) or (not Path(name).suffix and name.startswith(_DOCS))


def _topics(source: str) -> list[str]:
    """The values of the one dict of pydoc_data/topics.py, in its order."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            return [
                value.value for value in node.values if isinstance(value, ast.Constant) and isinstance(value.value, str)
            ]
    raise RunError(f"{_TOPICS}: holds no topics")


def _docstrings(source: str) -> str:
    """The docstrings of a module, its classes and functions, each below its dotted name."""
    if '"""' not in source:
        return ""
    # A syntax tree sets off the garbage collector again and again; with the rest of the heap out of its sight, parsing
    # takes less than half the time (3.7 instead of 8.3 s for this corpus).
    gc.freeze()
    try:
        module = ast.parse(source)
    except SyntaxError:  # test data and templates
        return ""
    finally:
        gc.unfreeze()
    found = [ast.get_docstring(module) or ""]
    _collect(module.body, "", found)
    return "\n\n".join(filter(None, found))


def _collect(body: list[ast.stmt], prefix: str, found: list[str]) -> None:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = prefix + node.name
            text = ast.get_docstring(node)
            if text:
                found.append(f"{name}\n\n{text}")
            if isinstance(node, ast.ClassDef):
                _collect(node.body, name + ".", found)
