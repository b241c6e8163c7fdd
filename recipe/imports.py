"""`imports: [my_layers.py]` in a run file: Python files of the user's, whose components the rest of it may name."""

import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

from flexbert_core.schema import ConfigError, expand_user


def import_components(node: dict[str, Any], config: Path) -> dict[str, Any]:
    """Run the files that a run file's node imports; the node with their absolute paths, as the resolved config has
    them. A file runs once in a process.

    config: the run file, whose folder relative paths start at. Raises ConfigError for a file that is missing or fails.
    """
    given = node.get("imports")
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        return node  # nothing, or what the schema refuses
    files = []
    for number, name in enumerate(given):
        try:
            file = (config.parent / expand_user(name)).resolve()
            there = file.is_file()
        except (OSError, ValueError) as error:  # a name that no file can have
            raise ConfigError(f"{config}: imports[{number}]: {name!r}: {error}") from None
        if not there or file.suffix != ".py":
            fault = "is no Python file (.py)" if there else "no such file; relative paths start at the run file"
            raise ConfigError(f"{config}: imports[{number}]: {file}: {fault}")
        _import(file, f"{config}: imports[{number}]: ")
        files.append(str(file))
    return {**node, "imports": files}


def _import(file: Path, where: str) -> None:
    # One name for one file, whatever the folder: a second load of the config must not register its components again
    name = f"imported_{file.stem}_{hashlib.blake2b(str(file).encode(), digest_size=8).hexdigest()}"
    if name in sys.modules:
        return
    # So that it can import files beside it, as when it is run as a script; behind all else, so that it hides nothing.
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # any code can raise anything
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        said = " ".join(str(error).split())
        raise ConfigError(f"{where}{file}:{line or 1}: {type(error).__name__}: {said}") from error
