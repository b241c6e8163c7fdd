"""`imports: [my_layers.py]` in a run file: Python files of the user's, whose components the rest of it may name."""

import hashlib
import importlib.util
import re
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from flexbert_core.calling import stands_at
from flexbert_core.schema import ConfigError, Registry, expand_user

PREFIX = "imported_"  # of the modules' names


class Blame(NamedTuple):
    """An error in a file of the user's. line: `callbacks: mine (mine.py:12): ValueError: text`."""

    line: str
    error: BaseException
    traceback: TracebackType | None  # from the first frame of the user's on; None: the error's text tells it


def blamed(error: BaseException) -> Blame | None:
    """Which part of the user's raised an error, or its cause; None where no imported file has to do with it."""
    files = {str(module.__file__) for name, module in sys.modules.items() if name.startswith(PREFIX)}
    cause: BaseException | None = error
    while cause is not None:
        steps, step = list[TracebackType](), cause.__traceback__
        while step is not None:
            steps.append(step)
            step = step.tb_next
        own = [step for step in steps if step.tb_frame.f_code.co_filename in files]
        if own:
            said = " ".join(f"{type(cause).__name__}: {cause}".split()).rstrip(": ")
            places = [(step.tb_frame.f_code.co_filename, step.tb_lineno) for step in own]
            return Blame(f"{_part(places)}: {said}", cause, own[0])
        cause = cause.__cause__
    # A DataLoader gives the traceback of its worker as text
    found = re.findall(r'^ *File "(.+)", line (\d+)', str(error), re.MULTILINE)
    places = [(file, int(line)) for file, line in found if file in files]
    return Blame(f"{_part(places)}: {str(error).strip().splitlines()[-1]}", error, None) if places else None


def _part(places: list[tuple[str, int]]) -> str:
    """The innermost entry that has one of these lines, and the innermost line."""
    file, line = places[-1]
    names = (
        f"{registry.slot_name}: {name} "
        for place in reversed(places)
        for registry in Registry.every
        for name, entry in registry.loaded.items()
        if stands_at(entry, *place)
    )
    where = f"{Path(file).name}:{line}"
    name = next(names, None)
    return where if name is None else f"{name}({where})"


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
    name = f"{PREFIX}{file.stem}_{hashlib.blake2b(str(file).encode(), digest_size=8).hexdigest()}"
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
