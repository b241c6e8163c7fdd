"""The job that trains a run of a sweep."""

import sys
from pathlib import Path

from jobs.base import ROOT, Job
from sweeps.folder import Cell


def job_of(cell: Cell, processes: int, until: int | None = None) -> Job:
    """processes: of the run. until: tokens to pause after."""
    launcher = [sys.executable]
    if processes > 1:
        launcher = [str(Path(sys.executable).parent / "composer"), "-n", str(processes)]
    pause = [] if until is None else ["--until", str(until)]
    return Job(cell.name, [*launcher, str(ROOT / "main.py"), "train", str(cell.file), *pause], cell.log)
