"""Jobs as a Slurm array, through submitit. The command waits for them; interrupting it cancels them."""

import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from flexbert_core.schema import Component, ConfigError, RunError
from jobs.base import JOBS, ROOT, Changed, Job, JobExecutor, note_end, run_here


@JOBS.register("slurm")
class SlurmJobs(JobExecutor):
    """One array through `sbatch`, where this machine and the nodes see the same files."""

    class Config(Component):
        name: Literal["slurm"] = "slurm"
        partition: str = Field(min_length=1)
        """Where the jobs run, as sbatch understands it."""
        minutes: int = Field(default=240, ge=1)
        """Limit for each job."""
        at_once: int = Field(default=256, ge=1)
        """Jobs that run at the same time."""
        gpus_per_job: int = Field(default=1, ge=0)
        """GPUs of a job."""
        cpus_per_job: int = Field(default=8, ge=1)
        """Cores of a job."""
        mem_gb: float | None = Field(default=None, gt=0)
        """Memory of a job; default: the cluster's."""
        sbatch_args: dict[str, str | int] = {}
        """More options for sbatch, such as {account: nlp, qos: normal}."""
        setup: list[str] = []
        """Shell commands at the start of each job, such as `module load cuda`."""
        poll_seconds: float = Field(default=10.0, gt=0)
        """Seconds between looks at the jobs."""

    config: Config

    def check(self) -> None:
        """Raises ConfigError where jobs cannot be submitted."""
        for program in ("sbatch", "squeue", "scancel", "sacct"):
            if shutil.which(program) is None:
                raise ConfigError(
                    f"executor: slurm: no {program} on PATH: run this where jobs can be submitted, "
                    "or use executor: local"
                )

    def run(self, jobs: Sequence[Job], changed: Changed) -> None:
        import submitit
        from submitit.core.utils import FailedJobError

        config = self.config
        folder = jobs[0].log.parent / "slurm"
        executor = submitit.SlurmExecutor(folder=folder)
        executor.update_parameters(
            job_name="flexbert",
            partition=config.partition,
            time=config.minutes,
            array_parallelism=config.at_once,
            cpus_per_task=config.cpus_per_job,
            gpus_per_node=config.gpus_per_job or None,
            mem=None if config.mem_gb is None else f"{round(config.mem_gb * 1024)}M",
            setup=[f"export PYTHONPATH={shlex.quote(str(ROOT))}:$PYTHONPATH", *config.setup],
            additional_parameters=dict(config.sbatch_args),
        )
        here = str(Path.cwd())
        try:
            with executor.batch():
                handles = [
                    executor.submit(run_here, list(job.command), str(job.log.absolute()), job.environment, here)
                    for job in jobs
                ]
        except FailedJobError as error:
            raise RunError(f"executor: slurm: sbatch refused: {_last_line(str(error))}") from None
        waiting = list(zip(jobs, handles, strict=True))
        started: set[str] = set()
        try:
            while waiting:
                for job, handle in list(waiting):
                    if job.name not in started and handle.state == "RUNNING":
                        started.add(job.name)
                        changed(job, None)
                    if handle.done():
                        waiting.remove((job, handle))
                        changed(job, _code(job, handle))
                if waiting:
                    time.sleep(config.poll_seconds)
        except BaseException:
            for _, handle in waiting:
                handle.cancel()
            raise


def _code(job: Job, handle: "object") -> int:
    try:
        return handle.result()  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as error:  # a time limit, a node that died: submitit raises its own kinds
        note_end(job.log, f"slurm: {_last_line(str(error))}")
        return 1


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
