"""`main.py sweep ...`: its command line. `sweep FILE` is `sweep run FILE`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from commands.arguments import path
from commands.one_line import FROM_RUNS, plain_errors


class _RunByDefault(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


sweep_app = typer.Typer(
    cls=_RunByDefault, help="Ablations: `sweep FILE` trains arms and seeds of a file.", no_args_is_help=True
)


@sweep_app.command()
def run(
    file: Annotated[Path, typer.Argument(parser=path, help="such as configs/sweep/activation.yaml", metavar="FILE")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="keys of the file to set, such as seeds=[0,1,2,3]", metavar="[KEY=VALUE]..."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, print arms, costs and what can be shown; start nothing")
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="with --dry-run and tokens_per_second: of one run's machines")
    ] = None,
) -> None:
    """Train what is missing of a sweep. Interrupted, the same command goes on; arms and seeds may be added."""
    with plain_errors(FROM_RUNS):
        from commands.sweep import sweep
        from flexbert_core.schema import ConfigError, plain_console

        if price_per_hour is not None and not dry_run:
            raise ConfigError("--price-per-hour: only says something with --dry-run")
        fine = sweep(file, overrides or [], dry_run, price_per_hour, plain_console())
    raise typer.Exit(0 if fine else 1)


@sweep_app.command()
def status(
    sweep: Annotated[Path, typer.Argument(parser=path, help="its file or its folder", metavar="SWEEP")],
    watch: Annotated[bool, typer.Option("--watch", help="until nothing of it trains")] = False,
    json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
) -> None:
    """Show where each run of a sweep stands."""
    with plain_errors():
        from commands.sweep import status as show
        from flexbert_core.schema import ConfigError, plain_console

        if watch and json:
            raise ConfigError("--json: is printed once: leave --watch out")
        show(sweep, watch, json, plain_console())


@sweep_app.command()
def power(
    noise: Annotated[
        float, typer.Option(help="standard deviation of a paired difference of two arms over seeds, in nats")
    ],
    difference: Annotated[float | None, typer.Option(help="nats; says how many seeds it needs")] = None,
    seeds: Annotated[int | None, typer.Option(help="says what so many show; default: several")] = None,
    arms: Annotated[int, typer.Option(help="with the baseline")] = 2,
) -> None:
    """Say how small a difference seeds can show, and how many seeds a difference needs."""
    with plain_errors():
        from commands.sweep_power import power as show
        from flexbert_core.schema import plain_console

        show(noise, difference, seeds, arms - 1, plain_console())
