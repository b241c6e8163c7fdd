"""Evaluations as their files and the command line make them."""

from pathlib import Path
from typing import Any

from evals.config import build_eval, load_eval_file, overrides_of


def evaluation_of(file: Path, *overrides: str) -> Any:
    """The evaluation of a file, with values set as by `main.py eval NAME MODEL key=value`."""
    loaded = load_eval_file(file, overrides_of(file.stem, [file.stem], overrides))
    return build_eval(loaded.evaluation, file.stem)
