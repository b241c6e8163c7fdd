"""`main.py decay` and `main.py phases`: their command lines."""

import os
from pathlib import Path
from typing import Annotated

import typer

from commands.arguments import Overrides, path, token_count
from commands.one_line import FROM_CHECKPOINT, plain_errors


def decay(
    run: Annotated[Path, typer.Argument(parser=path, help="a run folder: runs/NAME", metavar="RUN")],
    tokens: Annotated[
        int, typer.Option(parser=token_count, metavar="TOKENS", help="of the decay: 5B; slots, as a phase's tokens")
    ],
    overrides: Overrides = None,
    start: Annotated[
        int | None,
        typer.Option(
            "--from",
            parser=token_count,
            metavar="TOKENS",
            help="the run's checkpoint at so many tokens; default: its newest, or that of an unfinished branch",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="of the branch; default: RUN-decay-TOKENS-from-START")] = None,
    schedule: Annotated[str, typer.Option(help="how the learning rate falls, a name of slot schedule")] = (
        "one_minus_sqrt"
    ),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, print the plan, start nothing")] = False,
) -> None:
    """Let the learning rate fall from where a run stands, as a run of its own: live or stopped, it stays as it is.

    The same command resumes the branch. Launchers start it as they start `train`, with --from.
    """
    from training import signals

    with plain_errors(FROM_CHECKPOINT), signals.from_start_up():
        from commands.decay import decay_config
        from flexbert_core.schema import plain_console
        from training.effects import check_effects, ranks

        config = decay_config(run, tokens, start, name, schedule, overrides or [], ranks())
        check_effects(config, run / "config.yaml")
        console = plain_console(quiet=os.environ.get("RANK", "0") != "0")
        if dry_run:
            from commands.dry_run import dry_run as show

            show(config, console, ranks())
            return
        from commands.start import start as go

        go(config, console)


def phases(
    run: Annotated[Path, typer.Argument(parser=path, help="a run folder: runs/NAME", metavar="RUN")],
) -> None:
    """Show what a run has trained, phase by phase, what is to come, and what of it may still change."""
    with plain_errors():
        from commands.phases import show_phases
        from flexbert_core.schema import plain_console

        show_phases(run, plain_console())
