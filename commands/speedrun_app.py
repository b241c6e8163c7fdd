"""`main.py speedrun ...`: its command line."""

from pathlib import Path
from typing import Annotated

import typer

from commands.arguments import path
from commands.one_line import OneLineUsage, plain_errors

TRACK = Path("configs/speedrun/track-cpu.yaml")
speedrun_app = typer.Typer(
    cls=OneLineUsage, help="Least time to a held-out loss: tracks in configs/speedrun/.", no_args_is_help=True
)


@speedrun_app.callback()
def group() -> None:
    """Least time to a held-out loss: tracks in configs/speedrun/."""


@speedrun_app.command()
def verify(
    runs: Annotated[
        list[Path], typer.Argument(parser=path, help="finished runs of one recipe: runs/NAME", metavar="RUN...")
    ],
    track: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help=f"the track's file; default: {TRACK}")
    ] = None,
) -> None:
    """Recompute the loss of runs from their exports; say whether they keep to a track's rules and reach its loss."""
    with plain_errors():
        from commands.speedrun import verify as run
        from flexbert_core.schema import plain_console
        from recipe.track import load_track

        fine = run(runs, load_track(track or TRACK), plain_console())
    raise typer.Exit(0 if fine else 1)
