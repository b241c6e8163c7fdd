"""Jobs on this machine, some at a time, each with GPUs or cores of its own."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from flexbert_core.children import ends_with_parent
from flexbert_core.schema import Component, ConfigError
from jobs.base import JOBS, Changed, Job, JobExecutor

# Between SIGTERM and SIGKILL when the command is interrupted: time to save what a job has.
_GRACE_SECONDS = 30.0


@JOBS.register("local")
class LocalJobs(JobExecutor):
    """Processes of this machine. Each job has its GPUs, or a share of the cores, to itself."""

    class Config(Component):
        name: Literal["local"] = "local"
        at_once: int | None = Field(default=None, ge=1)
        """Jobs that run at the same time; default: as many as there are GPUs for, without GPUs one."""
        gpus_per_job: int | None = Field(default=None, ge=0)
        """GPUs that a job sees; default: 1 where there are some. 0: none, all run on the CPU."""
        cores_per_job: int | None = Field(default=None, ge=1)
        """Cores that a job is pinned to; default: an equal share of those that this process may use."""

    config: Config

    def check(self) -> None:
        """Raises ConfigError when the machine has less than was asked for, or GPUs for some of the jobs only."""
        gpus, cores = visible_gpus(), len(os.sched_getaffinity(0))
        per_job, at_once = self._dealt(gpus)
        if per_job > len(gpus):
            raise ConfigError(f"executor.gpus_per_job: {per_job}, but this machine shows {len(gpus)} GPUs: give fewer")
        if per_job * at_once > len(gpus):
            # A job without a GPU would compute with other kernels and another precision than the rest.
            raise ConfigError(
                f"executor.at_once: {at_once} jobs of {per_job} GPUs, but this machine shows {len(gpus)}: "
                f"give {len(gpus) // per_job} or less, or gpus_per_job: 0 to run all on the CPU"
            )
        share = self.config.cores_per_job or 1
        if share > cores:
            raise ConfigError(f"executor.cores_per_job: {share}, but this process may use {cores}: give fewer")
        if share * at_once > cores:
            raise ConfigError(
                f"executor.at_once: {at_once} jobs of {share} cores, but this process may use {cores}: "
                f"give {cores // share} or less"
            )

    def _dealt(self, gpus: Sequence[str]) -> tuple[int, int]:
        """GPUs of a job, and jobs that run at the same time."""
        per_job = self.config.gpus_per_job if self.config.gpus_per_job is not None else min(1, len(gpus))
        return per_job, self.config.at_once or (max(1, len(gpus) // per_job) if per_job else 1)

    def places(self) -> list[dict[str, Any]]:
        """For each job that runs at the same time, `gpus` that it sees (or none are hidden) and `cores` it runs on."""
        gpus, cores = visible_gpus(), sorted(os.sched_getaffinity(0))
        per_job, at_once = self._dealt(gpus)
        share = self.config.cores_per_job or max(1, len(cores) // at_once)
        return [
            {
                "gpus": gpus[number * per_job : (number + 1) * per_job] if gpus else None,
                "cores": cores[number * share : (number + 1) * share],
            }
            for number in range(at_once)
        ]

    def run(self, jobs: Sequence[Job], changed: Changed) -> None:
        free, waiting, running = self.places(), list(jobs), {}
        try:
            while waiting or running:
                while waiting and free:
                    job, place = waiting.pop(0), free.pop(0)
                    running[_start(job, place)] = (job, place)
                    changed(job, None)
                for process in [process for process in running if process.poll() is not None]:
                    job, place = running.pop(process)
                    free.append(place)
                    changed(job, process.returncode)
                time.sleep(0.05)
        finally:
            _stop(list(running))


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _start(job: Job, place: dict[str, Any]) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(place["cores"])), **job.environment}
    if place["gpus"] is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(place["gpus"])
    cores = set(place["cores"])
    end_with_us = ends_with_parent(signal.SIGTERM)

    def before() -> None:
        end_with_us()
        os.sched_setaffinity(0, cores)

    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        # A session of its own: Ctrl-C reaches this process only, which then ends the jobs.
        return subprocess.Popen(
            list(job.command),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=before,
        )


def _stop(processes: list["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return
