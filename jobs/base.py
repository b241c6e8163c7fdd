"""What a job and an executor of jobs are. A job is a command; whether its work is done it tells by its exit code."""

import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from flexbert_core.children import ends_with_parent
from flexbert_core.schema import Component, Registry

ROOT = Path(__file__).parent.parent
JOBS = Registry("executor of jobs", has_imports=False, filled_by=["jobs.entries"])


@dataclass(frozen=True)
class Job:
    """One command. Running it again after it was killed must go on, not begin anew."""

    name: str
    """Unique among those that are run together."""
    command: Sequence[str]
    log: Path
    """What it prints, both streams."""
    environment: dict[str, str] = field(default_factory=dict)
    """Beside this process's."""


# Job and exit code; None: it has begun, or is in a queue.
Changed = Callable[[Job, int | None], None]


class JobExecutor(ABC):
    """Runs commands somewhere. An entry of the slot has a `Config`."""

    begun: ClassVar[str] = "started"
    """What it means of a job that `changed` is called without an exit code."""

    def __init__(self, config: Component) -> None:
        self.config: Any = config

    def check(self) -> None:  # noqa: B027 (most have nothing to check)
        """Raise ConfigError for what would keep all jobs from running."""

    @abstractmethod
    def run(self, jobs: Sequence[Job], changed: Changed) -> None:
        """Run all and wait for them, in any order; one that fails stops none of the others. `changed` is called in
        this thread. When this is interrupted, no job goes on. Raises RunError when jobs cannot be started at all."""


def run_here(command: list[str], log: str, environment: dict[str, str], folder: str) -> int:
    """Life of a job on its node. The command's exit code. folder: to run in, which relative paths mean. The command is
    asked to stop when this process ends."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with Path(log).open("ab") as file:
        return subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            check=False,
            preexec_fn=ends_with_parent(signal.SIGTERM),
        ).returncode


def note_end(log: Path, text: str) -> None:
    """Add to a job's log why it ended, where it could not itself: `explain` says the last line, which may be one of an
    older attempt."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as out:
            out.write(f"{text}\n")
    except OSError:
        sys.stderr.write(f"{log}: {text}\n")


def told(jobs: Sequence[Job], say: Callable[[str], None], begun: str) -> Changed:
    """For an executor's `changed`: says of each job that it has begun, and how it ended. begun: the executor's."""
    left = len(jobs)

    def changed(job: Job, code: int | None) -> None:
        nonlocal left
        if code is None:
            say(f"{begun}  {job.name}")
            return
        left -= 1
        said = f"done  {job.name}" if code == 0 else f"warning: {explain(job, code)}"
        say(f"{said}  ({left} jobs left)")

    return changed


def explain(job: Job, code: int) -> str:
    """Why it failed, in one line: the last that it printed, and where the rest is."""
    try:
        lines = [line for line in job.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    said = lines[-1].strip() if lines else "it printed nothing"
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{job.name}: {how}: {said} (log: {job.log})"
