"""Arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer


def place(path: str) -> str:
    """A folder, file or URL with a leading ~ expanded, also where no shell has seen it (--output=~/x)."""
    from flexbert_core.schema import expand_user

    try:
        return expand_user(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def path(given: str) -> Path:
    """The same as a path."""
    return Path(place(given))


def token_count(given: str) -> int:
    """A count of tokens, 1 or more: 300K, 1e6."""
    from flexbert_core.schema import parse_count

    try:
        found = parse_count(given)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not found:
        raise typer.BadParameter("expected 1 token or more")
    return found


Config = Annotated[Path, typer.Argument(parser=path, help="the run file, such as configs/demo.yaml", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="values to set: key.path=value; of one key the last counts", metavar="[KEY=VALUE]..."),
]
