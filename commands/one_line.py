"""What is wrong, with the command line or in a command, is said in one line on stderr and by the exit code."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup


class OneLineUsage(TyperGroup):
    """Says what is wrong with the command line in one line on stderr, like everything else that is wrong: typer's box
    of six lines hides it from scripts and logs."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            code = super().main(*args, **options, standalone_mode=False)
        except typer.TyperException as error:
            # What a command without arguments prints is its help; the message holds nothing then.
            if message := " ".join(error.format_message().split()):
                print(f"error: {message}", file=sys.stderr, flush=True)
            sys.exit(error.exit_code)
        except typer.Abort:
            sys.exit(1)
        sys.exit(code)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors that the user can act on become one line each on stderr and an exit code; bugs keep their traceback. Those
    of a user's own part show it from their first frame on, and the line behind it."""
    from flexbert_core.schema import ConfigError, RunError

    try:
        yield
    except (ConfigError, RunError) as error:
        sys.stdout.flush()
        print(f"error: {error}".replace("\n", "\nerror: "), file=sys.stderr, flush=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None
    except (KeyboardInterrupt, SystemExit) as stop:
        # Composer turns SIGINT and SIGTERM into SystemExit(128 + number); 85: training.signals.EXIT_PREEMPTED.
        code = stop.code if isinstance(stop, SystemExit) else 130
        if code in (85, 130, 143):
            print("interrupted: the same command goes on from the newest checkpoint", file=sys.stderr)
        raise typer.Exit(code if isinstance(code, int) else 1) from None
    except Exception as error:
        from recipe.imports import blamed

        if (blame := blamed(error)) is None:
            raise
        sys.stdout.flush()
        if blame.traceback is None:
            print(error, file=sys.stderr)
        else:
            traceback.print_exception(type(blame.error), blame.error, blame.traceback)
        print(f"error: {blame.line}", file=sys.stderr, flush=True)
        raise typer.Exit(1) from None
