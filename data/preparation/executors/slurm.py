"""A Slurm cluster: each stage is a job array, and the command waits for it.

The command runs where `sbatch` works and sees the same files as the compute nodes (repository, environment, sources,
output). Jobs are found again by their name, which only this output and stage have: after a kill, the same command waits
for what was left running, and submits what is missing then.
"""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import dill
import xxhash
from datatrove.executor.base import DistributedEnvVars
from datatrove.executor.slurm import SlurmPipelineExecutor
from pydantic import Field

from data.preparation.executors.base import EXECUTORS, ROOT, Executor, RecordsFailures, Stage, display, quiet
from flexbert_core.durable import write_file
from flexbert_core.schema import Component, ConfigError, RunError

# A finished task's mark may reach this machine late, through a network file system.
SETTLE_SECONDS = 15.0
_FAILED_POLLS = 20
JOBS_FILE = "slurm-jobs"
"""In WORK: the names of jobs that were submitted. What a killed command left running holds no lock."""


@EXECUTORS.register("slurm")
class Slurm(Executor):
    """Job arrays through `sbatch`. Interrupting the command cancels its jobs; killing it does not."""

    class Config(Component):
        name: Literal["slurm"] = "slurm"
        partition: str = Field(min_length=1)
        """Where the jobs run, as sbatch understands it."""
        time: str = "24:00:00"
        """Limit for each job, as sbatch understands it."""
        cpus_per_task: int = Field(1, ge=1)
        """The tokenizer uses them all."""
        mem_per_cpu_gb: int = Field(4, ge=1)
        """Memory that Slurm sets aside for each task and CPU."""
        max_running: int | None = Field(None, ge=1)
        """Tasks that run at the same time."""
        max_array_size: int = Field(1000, ge=1)
        """The cluster's limit (MaxArraySize - 1); more tasks become several arrays."""
        tasks_per_job: int = Field(1, ge=1)
        """Tasks that one job does in turn."""
        sbatch_args: dict[str, str | int] = {}
        """More options for sbatch, such as {account: nlp, qos: normal}."""
        setup: str = ""
        """Shell commands at the start of each job, such as `module load ...`."""
        poll_seconds: float = Field(10.0, gt=0)
        """Seconds between looks at the jobs."""

    config: Config

    def check(self) -> None:
        for program in ("sbatch", "squeue", "scancel"):
            if shutil.which(program) is None:
                raise ConfigError(
                    f"executor: slurm: no {program} on PATH: run this where jobs can be submitted, "
                    "or use executor: local"
                )

    def run(self, stage: Stage) -> None:
        """Raises RunError when sbatch refuses, or naming the first task that failed and its log."""
        name = f"prepare-{xxhash.xxh3_64_hexdigest(str(stage.work.resolve()))[:12]}-{stage.name}"
        if not stage.unfinished():
            return
        (stage.work / "progress.npy").unlink(missing_ok=True)  # of an earlier local run: nobody would look at it
        total = sum(stage.sizes)
        with (
            quiet(stage.work) as stderr,
            display(stage.title, total, stage.done_bytes, stderr, self.config.poll_seconds),
        ):
            try:
                self._wait(stage, name)  # for what an earlier command left running
                if stage.unfinished():
                    _note(stage.work / JOBS_FILE, name)
                    self._submit(stage, name)
                    self._wait(stage, name)
                    self._settle(stage)
            except BaseException:
                subprocess.run(["scancel", "--name", name], capture_output=True, check=False)
                raise
        left = stage.unfinished()
        if left:
            log = _newest(stage.logs / "slurm")
            cause = stage.failure() or "it left no word (time limit, memory, node?)"
            raise RunError(
                f"{stage.title}: {len(left)} of {len(stage.sizes)} tasks are not done, the first is {left[0]}: {cause} "
                f"(logs: {log}): run the same command again to go on"
            )

    def _submit(self, stage: Stage, name: str) -> None:
        config = self.config
        executor = _Executor(
            list(stage.steps),
            tasks=len(stage.sizes),
            time=config.time,
            partition=config.partition,
            cpus_per_task=config.cpus_per_task,
            mem_per_cpu_gb=config.mem_per_cpu_gb,
            workers=config.max_running or -1,
            job_name=name,
            qos="",
            env_command=_environment(config),
            sbatch_args=dict(config.sbatch_args),
            max_array_size=config.max_array_size,
            logging_dir=str(stage.logs.resolve()),
            slurm_logs_folder=str(stage.logs.resolve() / "slurm"),
            tasks_per_job=config.tasks_per_job,
        )
        executor.submit(stage.unfinished(), config.max_array_size)

    def _wait(self, stage: Stage, name: str) -> None:
        """Until no job of that name is left."""
        failed = 0
        while True:
            listed = _run("squeue", "--noheader", "--name", name, "--format", "%i")
            failed = failed + 1 if listed.returncode else 0
            if failed > _FAILED_POLLS:
                raise RunError(f"squeue fails again and again: {_last_line(listed.stderr)}")
            if not failed and not listed.stdout.strip():
                break
            time.sleep(self.config.poll_seconds)

    def _settle(self, stage: Stage) -> None:
        """Until the marks of finished tasks had time to arrive."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while stage.unfinished() and stage.failure() is None and time.monotonic() < deadline:
            time.sleep(min(self.config.poll_seconds, 1.0))


class _Executor(RecordsFailures, SlurmPipelineExecutor):
    """datatrove's, but for the submission: its own asks for a job of statistics and hides what sbatch says."""

    def submit(self, ranks: list[int], max_array_size: int) -> None:
        folder = Path(str(self.logging_dir.resolve_paths("")))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "executor.pik").write_bytes(dill.dumps(self, fmode=dill.CONTENTS_FMODE))
        (folder / "ranks_to_run.json").write_text(json.dumps(ranks))
        jobs = math.ceil(len(ranks) / self.tasks_per_job)
        for offset in range(math.ceil(jobs / max_array_size)):
            size = min(max_array_size, jobs - offset * max_array_size)
            command = shlex.join(["launch_pickled_pipeline", str(folder / "executor.pik")])
            script = folder / "launch_script.slurm"
            script.write_text(self.get_launch_file_contents(self.get_sbatch_args(size), command))
            done = _run("sbatch", f"--export=ALL,RUN_OFFSET={offset}", str(script))
            if done.returncode:
                raise RunError(f"sbatch refused the job (exit code {done.returncode}): {_last_line(done.stderr)}")

    def get_distributed_env(self, node_rank: int = -1) -> DistributedEnvVars:
        """datatrove's asks scontrol for the nodes' names; nothing here wants them."""
        return DistributedEnvVars(
            datatrove_node_ips="localhost",
            datatrove_cpus_per_task=str(self.cpus_per_task),
            datatrove_mem_per_cpu=str(self.mem_per_cpu_gb),
            datatrove_gpus_on_node="0",
            datatrove_executor="SLURM",
        )


def check_no_jobs(work: Path) -> None:
    """Raises RunError when jobs of an earlier command may still be at work in this folder, and would write beside
    others."""
    file = work / JOBS_FILE
    for name in file.read_text(encoding="utf-8").split() if file.exists() else ():
        if shutil.which("squeue") is None:
            raise RunError(
                f"{work.parent}: executor slurm has worked here, and without squeue on PATH nobody can say whether job "
                f"{name} still does: run this where squeue is, or delete {file} when it does not"
            )
        listed = _run("squeue", "--noheader", "--name", name, "--format", "%i")
        if listed.returncode:
            raise RunError(
                f"{work.parent}: whether Slurm job {name} still runs: {_last_line(listed.stderr)}: try again"
            )
        if listed.stdout.strip():
            raise RunError(
                f"{work.parent}: Slurm job {name} of an earlier command is still at work here: wait for it to end, or "
                f"scancel --name {name}"
            )


def _note(file: Path, name: str) -> None:
    names = file.read_text(encoding="utf-8").split() if file.exists() else []
    if name not in names:
        write_file(file, "".join(f"{each}\n" for each in [*names, name]))


def _environment(config: Slurm.Config) -> str:
    """What a job does before the pipeline: the user's commands, then this Python and this repository."""
    threads = config.cpus_per_task
    paths = os.pathsep.join([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    return "\n".join(
        [
            config.setup,
            f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
            f"export PYTHONPATH={shlex.quote(paths)}",
            f"export TOKENIZERS_PARALLELISM={'true' if threads > 1 else 'false'} RAYON_NUM_THREADS={threads}",
            f"cd {shlex.quote(str(Path.cwd()))}",  # sources may be relative paths
        ]
    )


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def _newest(folder: Path) -> Any:
    files = sorted(folder.glob("*.out"), key=lambda file: file.stat().st_mtime)
    return files[-1] if files else folder
