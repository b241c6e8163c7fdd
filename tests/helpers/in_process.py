"""Runs of a second over `tiny`'s data, in the test's own process."""

from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from main import app
from recipe.config import load_run_config
from tests.helpers.tiny import ROW, ROWS, write_config
from training.checkpoints.files import list_checkpoints
from training.trainer import train

PER_STEP = ROWS * ROW


def go(file: Path, *overrides: str, console: Console | None = None) -> Path:
    """The run's folder."""
    config = load_run_config(file, overrides)
    train(config, console or Console(quiet=True))
    return config.folder


def said(file: Path, *overrides: str) -> str:
    console = Console(record=True, quiet=True, width=10_000)
    console.quiet = False
    with console.capture() as capture:
        go(file, *overrides, console=console)
    return " ".join(capture.get().split())


def invoke(*arguments: str, code: int = 0) -> str:
    """What a command prints."""
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "10000"})
    assert done.exit_code == code, done.output
    return done.output


def last(run: Path, name: str) -> Any:
    return load_file(list_checkpoints(run / "checkpoints")[-1] / name)


def branch(folder: Path, data: Path, origin: Any, steps: int, **changes: Any) -> Path:
    return write_config(folder, data, steps, **{"from": origin}, **changes)
