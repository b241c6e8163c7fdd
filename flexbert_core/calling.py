"""Whether a registered part takes what it will be given, before it is called; and where it stands."""

import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def call_fault(entry: Any, arguments: Iterable[str], facts: Iterable[str]) -> str | None:
    """`__init__ takes no 'plan': write __init__(self, config, *, plan)` where a class or function cannot be called with
    these positional arguments and keywords; None where it can."""
    constructor = _constructor(entry)
    name = entry.__name__ if constructor is entry else "__init__"
    positional = [*(["self"] if constructor is not entry else []), *arguments]
    try:
        inspect.signature(constructor).bind(*positional, **dict.fromkeys(facts))
    except TypeError as error:
        wanted = [*positional, *(["*", *facts] if facts else [])]
        return f"{name} {_said(error)}: write {name}({', '.join(wanted)}), see docs/extending"
    except ValueError:  # a builtin without a signature
        return None
    return None


def place_of(entry: Any) -> str:
    """`my_norm.py:12`, where a class or function begins; `?` for what has no source."""
    try:
        file, line = inspect.getsourcefile(entry), inspect.getsourcelines(entry)[1]
    except (OSError, TypeError):
        return "?"
    return f"{Path(file or '?').name}:{line}"


def stands_at(entry: Any, file: str, line: int) -> bool:
    """Whether this line is one of the class's or function's own."""
    try:
        if inspect.getsourcefile(entry) != file:
            return False
        lines, first = inspect.getsourcelines(entry)
        return first <= line < first + len(lines)
    except (OSError, TypeError):
        return False


def _said(error: TypeError) -> str:
    said = str(error).replace("got an unexpected keyword argument", "takes no")
    said = said.replace("too many positional arguments", "takes no config")
    return re.sub(r"missing a required .*?argument: ('.*')", r"wants \1, which it is not given", said)


def _constructor(entry: Any) -> Any:
    """Whose signature counts."""
    if not isinstance(entry, type):
        return entry
    init: Any = entry.__init__
    if init is object.__init__:
        return _takes_self if entry.__new__ is object.__new__ else entry
    # nn.Module's own says that it takes anything, and then takes nothing; libraries put others in its place.
    owner = next(each for each in entry.__mro__ if "__init__" in vars(each))
    return _takes_self if owner.__module__ == "torch.nn.modules.module" else init


def _takes_self(self: Any) -> None:
    pass
