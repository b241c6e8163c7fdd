"""Jobs as Ray tasks, on a cluster or on this machine."""

import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from flexbert_core.schema import Component, ConfigError, RunError
from jobs.base import JOBS, ROOT, Changed, Job, JobExecutor, note_end, run_here

log = logging.getLogger(__name__)


@JOBS.register("ray")
class RayJobs(JobExecutor):
    """Tasks of a Ray cluster whose nodes see the same files, or of Ray on this machine."""

    class Config(Component):
        name: Literal["ray"] = "ray"
        address: str | None = None
        """Of a running cluster, such as `auto` or ray://host:10001; default: start Ray on this machine, and stop it."""
        gpus_per_job: float = Field(default=0, ge=0)
        """GPUs that a job has; a fraction shares one."""
        cpus_per_job: int = Field(default=1, ge=1)
        """Cores that a job has."""

    config: Config
    begun = "queued"  # it has no word of when a task begins

    def check(self) -> None:
        """Raises ConfigError without the package."""
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(
                "executor: ray: the package ray is not installed: pip install -r requirements-data.txt, "
                "or use executor: local"
            )

    def run(self, jobs: Sequence[Job], changed: Changed) -> None:
        config = self.config
        connect(config.address, "executor: ray")
        import ray  # pyright: ignore[reportMissingImports] (of the data extra)
        from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]

        try:
            task = ray.remote(num_cpus=config.cpus_per_job, num_gpus=config.gpus_per_job, max_retries=0)(run_here)
            waiting = {}
            for job in jobs:
                threads = {"OMP_NUM_THREADS": str(config.cpus_per_job), **job.environment}
                # Workers have the folder that `ray start` was given in.
                handle = task.remote(list(job.command), str(job.log.absolute()), threads, str(Path.cwd()))
                waiting[handle] = job
                changed(job, None)
            while waiting:
                done, _ = ray.wait(list(waiting), num_returns=1)
                job = waiting.pop(done[0])
                try:
                    code = ray.get(done[0])
                except RayError as error:  # its process or node died, or it could not be started
                    note_end(job.log, f"ray: {reason(error)}")
                    code = 1
                changed(job, code)
        finally:
            ray.shutdown()


def reason(error: Exception) -> str:
    """What a RayError says, in one line: of an exception in a task that exception, without its stack."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return f"{type(cause).__name__}: {cause}".splitlines()[0]
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def connect(address: str | None, who: str) -> None:
    """Start Ray in this process; its workers find the project's modules. address: as in RayJobs.Config. who: begins the
    message of the RunError that is raised where Ray cannot be reached."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to a server outside
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray  # pyright: ignore[reportMissingImports] (of the data extra)

    if not address and (other := os.environ.get("RAY_ADDRESS")):
        log.warning("%s: RAY_ADDRESS=%s is not used: Ray starts on this machine; address: auto joins it", who, other)
    options: dict[str, Any] = {} if address else {"include_dashboard": False}
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    options["runtime_env"] = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    try:
        # "local": without an address it would join a cluster of RAY_ADDRESS or of `ray start`.
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, ValueError, RuntimeError) as error:
        where = f"the Ray cluster at {address!r}" if address else "Ray on this machine"
        raise RunError(f"{who}: cannot reach {where}: {str(error).splitlines()[0]}") from None
