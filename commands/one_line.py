"""What is wrong, with the command line or in a command, is said in one line on stderr and by the exit code."""

import errno
import os
import shutil
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


# What the same command does when it was interrupted.
FROM_CHECKPOINT = "goes on from the newest checkpoint"
FROM_TASKS = "goes on; finished tasks are not done again"
FROM_CELLS = "goes on; finished cells are not computed again"
FROM_RUNS = "goes on; finished runs are not trained again, others go on from their newest checkpoints"
FROM_PUSHED = "goes on; what is pushed is not pushed again"


# What a file system says of what the user can mend. Other faults of files are ours.
_ROOM, _PLACE = "make room there, or choose another place", "choose a place where you may write, or mend its rights"
_REFUSALS = {errno.ENOSPC: _ROOM, errno.EDQUOT: _ROOM, errno.EFBIG: _ROOM}
_REFUSALS |= {errno.EACCES: _PLACE, errno.EPERM: _PLACE, errno.EROFS: _PLACE, errno.ENOTDIR: _PLACE}
_REFUSALS |= {errno.ENAMETOOLONG: "choose a shorter name", errno.EIO: "the disk or its server fails: check it"}


def refused(error: Exception) -> str | None:
    """What the file system has refused, and what to do, in one line; None for anything else."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        _, target, said = error.args[0][0]  # of copytree: what failed of each file, as text
        number = next((number for number in _REFUSALS if f"[Errno {number}]" in str(said)), 0)
        from flexbert_core.durable import UNFINISHED

        error = OSError(number, os.strerror(number), str(target).replace(UNFINISHED, ""))
    if not isinstance(error, OSError) or error.errno not in _REFUSALS:
        return None
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror}: {_REFUSALS[error.errno]}"


@contextmanager
def plain_errors(again: str | None = None) -> Iterator[None]:
    """Errors that the user can act on become one line each on stderr and an exit code; bugs keep their traceback. Those
    of a user's own part show it from their first frame on, and the line behind it.

    again: what the same command does when this one was interrupted; None: it begins anew, of which nothing is said.
    """
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
            print("interrupted" if again is None else f"interrupted: the same command {again}", file=sys.stderr)
        raise typer.Exit(code if isinstance(code, int) else 1) from None
    except Exception as error:
        from recipe.imports import blamed

        if (blame := blamed(error)) is None:
            if (line := refused(error)) is None:
                raise
            sys.stdout.flush()
            print(f"error: {line}", file=sys.stderr, flush=True)
            raise typer.Exit(1) from None
        sys.stdout.flush()
        if blame.traceback is None:
            print(error, file=sys.stderr)
        else:
            traceback.print_exception(type(blame.error), blame.error, blame.traceback)
        print(f"error: {blame.line}", file=sys.stderr, flush=True)
        raise typer.Exit(1) from None
