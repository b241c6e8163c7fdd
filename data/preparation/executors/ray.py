"""A Ray cluster, or Ray on this machine."""

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any, Literal

from datatrove.executor.ray import RayPipelineExecutor
from pydantic import Field

from data.preparation.executors.base import EXECUTORS, ROOT, Executor, RecordsFailures, Stage, display, quiet
from flexbert_core.schema import Component, ConfigError, RunError

log = logging.getLogger(__name__)


@EXECUTORS.register("ray")
class Ray(Executor):
    """Ray tasks. All nodes see the same files (repository, environment, sources, output)."""

    class Config(Component):
        name: Literal["ray"] = "ray"
        address: str | None = None
        """Of a running cluster, such as `auto` or ray://host:10001; default: start Ray on this machine, and stop it."""
        workers: int | None = Field(None, ge=1)
        """Tasks that run at the same time; default: as many as the cluster has room for."""
        cpus_per_task: int = Field(1, ge=1)
        """The tokenizer uses them all."""
        mem_per_cpu_gb: float = Field(2.0, gt=0)
        """Memory that Ray sets aside for each task and CPU."""
        tasks_per_job: int = Field(1, ge=1)
        """Tasks that one Ray job does at the same time."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.connected = False

    def check(self) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(
                "executor: ray: the package ray is not installed: pip install -r requirements-data.txt, "
                "or use executor: local"
            )

    def run(self, stage: Stage) -> None:
        """Raises RunError naming the first task that failed."""
        if not stage.unfinished():
            return
        (stage.work / "progress.npy").unlink(missing_ok=True)  # of an earlier local run: nobody would look at it
        with (
            quiet(stage.work) as stderr,
            display(stage.title, sum(stage.sizes), stage.done_bytes, stderr, 2.0),
        ):
            self._connect()
            executor = _Executor(
                list(stage.steps),
                tasks=len(stage.sizes),
                workers=self.config.workers or -1,
                logging_dir=str(stage.logs.resolve()),
                cpus_per_task=self.config.cpus_per_task,
                mem_per_cpu_gb=self.config.mem_per_cpu_gb,
                tasks_per_job=self.config.tasks_per_job,
            )
            executor.folder = str(Path.cwd())  # a running cluster's workers have the one that `ray start` was given in
            executor.run()
        left = stage.unfinished()
        if left:
            cause = stage.failure() or "it left no word (memory, node?)"
            raise RunError(
                f"{stage.title}: {len(left)} of {len(stage.sizes)} tasks are not done, the first is {left[0]}: "
                f"{cause}: run the same command again to go on"
            )

    def stop(self) -> None:
        if self.connected:
            import ray  # pyright: ignore[reportMissingImports] (of the data extra)

            ray.shutdown()

    def _connect(self) -> None:
        if self.connected:
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to a server outside
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray  # pyright: ignore[reportMissingImports]

        threads = self.config.cpus_per_task
        paths = os.pathsep.join([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
        variables = {
            "PYTHONPATH": paths,
            "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
            "RAYON_NUM_THREADS": str(threads),
        }
        if not self.config.address and (other := os.environ.get("RAY_ADDRESS")):
            said = "executor: ray: RAY_ADDRESS=%s is not used: Ray starts on this machine; address: auto joins it"
            log.warning(said, other)
        options: dict[str, Any] = {} if self.config.address else {"include_dashboard": False}
        try:
            ray.init(
                address=self.config.address or "local",  # else it joins one of RAY_ADDRESS or of `ray start`
                runtime_env={"env_vars": variables},
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
            )
        except (OSError, ValueError, RuntimeError) as error:
            where = f"the Ray cluster at {self.config.address!r}" if self.config.address else "Ray on this machine"
            raise RunError(f"executor: ray: cannot reach {where}: {str(error).splitlines()[0]}") from None
        self.connected = True


class _Executor(RecordsFailures, RayPipelineExecutor): ...
