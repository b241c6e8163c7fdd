"""Modules from texts that an export carries, under names of their own. Needs Python alone. Licence: Apache-2.0.

Texts import one another by the names that they had where they were written. Here these names lead to the texts,
whatever else the process has under them: an installed FlexBERT, or the texts of another export.
"""

import builtins
import hashlib
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class CarriedModules(importlib.abc.MetaPathFinder, importlib.abc.ExecutionLoader):
    """Loads the modules `sources`: path, such as flexbert/norms.py, -> text.

    importable: the first names of modules that the texts find among them; what else they import is the process's.
    folder: where tracebacks say the texts are.
    """

    def __init__(self, sources: Mapping[str, str], importable: Iterable[str], folder: Path) -> None:
        self.sources, self.importable, self.folder = dict(sources), frozenset(importable), folder
        digest = hashlib.sha256(repr((sorted(self.sources.items()), sorted(self.importable))).encode()).hexdigest()
        self.prefix = f"flexbert_export_{digest[:16]}"
        if not any(isinstance(finder, CarriedModules) and finder.prefix == self.prefix for finder in sys.meta_path):
            sys.meta_path.insert(0, self)

    def load(self, path: str) -> Any:
        """The module of one of the texts, which runs once in a process."""
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        return importlib.import_module(f"{self.prefix}.{name}")

    def _inner(self, name: str) -> str:
        return name.removeprefix(self.prefix).lstrip(".").replace(".", "/")

    def _path(self, name: str) -> str | None:
        inner = self._inner(name)
        return next((path for path in (f"{inner}/__init__.py", f"{inner}.py") if path in self.sources), None)

    def is_package(self, fullname: str) -> bool:
        inner = self._inner(fullname)
        return not inner or any(path.startswith(f"{inner}/") for path in self.sources)

    def get_filename(self, fullname: str) -> str:
        return str(self.folder / (self._path(fullname) or f"{self._inner(fullname)}/__init__.py".lstrip("/")))

    def get_source(self, fullname: str) -> str:
        path = self._path(fullname)
        return "" if path is None else self.sources[path]  # a folder without an __init__.py

    def get_code(self, fullname: str) -> Any:
        return compile(self.get_source(fullname).encode(), self.get_filename(fullname), "exec", dont_inherit=True)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] != self.prefix or not (self._path(fullname) or self.is_package(fullname)):
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def exec_module(self, module: Any) -> None:
        # An import statement calls the `__import__` of the builtins that its module has.
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": self._import}
        exec(self.get_code(module.__name__), module.__dict__)

    def _import(self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        first = name.partition(".")[0]
        if level or first not in self.importable:
            return builtins.__import__(name, globals, locals, fromlist, level)
        ours = f"{self.prefix}.{name}"
        if fromlist:
            return builtins.__import__(ours, globals, locals, fromlist)
        importlib.import_module(ours)
        return sys.modules[f"{self.prefix}.{first}"]  # `import a.b` binds a
