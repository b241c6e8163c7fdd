"""`main.py publish RUN`: push a run's exports to where its `publish` says, or show what would be pushed."""

import logging
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from flexbert_core.schema import ConfigError
from recipe.publishing import TARGETS

if TYPE_CHECKING:
    from evals.publishing.push import Plan

_NICE = 10  # of a push beside training: it takes what the loader leaves


def publish(
    run: Path,
    overrides: Sequence[str],
    only: str | None,
    results: Sequence[Path],
    dry_run: bool,
    background: bool,
    console: Console,
) -> None:
    """overrides: keys of the section `publish`, over what the run has recorded. background: beside training.

    Raises ConfigError when the run or the target cannot be used, RunError when the target cannot be reached.
    """
    # Before huggingface_hub is imported, by whatever: see evals/publishing/hub.py.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from evals.publishing.push import Publishing
    from recipe.config import read_recorded_config
    from training.folder import RunFolder

    if background:
        os.nice(_NICE)
        sys.stdout.write(f"{datetime.now().isoformat(' ', 'seconds')}: looking for what is to be published\n")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    folder = RunFolder(run)
    folder.recorded_config()  # says what is no run folder
    publishing = Publishing(folder, read_recorded_config(run / "config.yaml", _checked(overrides)), results)
    if dry_run:
        _show(publishing.plan(only), console)
        return
    pushed = publishing.push(only, lambda text: console.print(text, soft_wrap=True), wait=background)
    plural = "" if pushed == 1 else "s"
    done = f"{pushed} revision{plural} pushed" if pushed else "all is there, nothing to do"
    console.print(f"{publishing.target.where}: {done}", soft_wrap=True)


def _checked(overrides: Sequence[str]) -> list[str]:
    """A target that is given takes the place of the one recorded."""
    for override in overrides:
        if not override.startswith("publish.") or "=" not in override:
            raise ConfigError(f"{override}: only keys of `publish` can be set here, such as publish.folder=DIR")
    given = {override.partition("=")[0].removeprefix("publish.") for override in overrides}
    cleared = [f"publish.{key}=null" for key in TARGETS if given & set(TARGETS) and key not in given]
    return [*cleared, *overrides]


def _show(plan: "Plan", console: Console) -> None:
    table = Table("revision", "state", show_edge=False, pad_edge=False)
    for revision in sorted([*plan.there, *plan.missing], key=lambda each: (each.tokens, each.average)):
        state = "to be pushed" if revision in plan.missing else "there"
        table.add_row(revision.name, state)
    console.print(table)
    main = "stays" if plan.main is None else f"becomes {plan.main.name}"
    console.print(
        f"{plan.where}: {len(plan.missing)} to be pushed, {len(plan.there)} there; main {main}", soft_wrap=True
    )
