"""`main.py launch slurm`: a run as a Slurm job that goes on by itself after time limits and preemption."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from commands.dry_run import dry_run
from flexbert_core.durable import write_file
from flexbert_core.schema import ConfigError, RunError, plain_console
from recipe.config import RunConfig, load_run_config
from recipe.phases import PhasePlan
from training.effects import check_effects
from training.signals import EXIT_PREEMPTED

ROOT = Path(__file__).parent.parent
TEMPLATE = ROOT / "configs" / "launch" / "slurm.sbatch"
# Seconds between SIGUSR2 and the time limit: a step and a checkpoint must fit.
LEAD = 300
CPUS_PER_GPU = 4
# Options of sbatch that have a flag here, and those that the script sets or that would break what it does.
_FLAGS = {
    "nodes": "--nodes",
    "time": "--time",
    "partition": "--partition",
    "account": "--account",
    "gpus-per-node": "--gpus-per-node",
    "cpus-per-task": "--cpus-per-node",
}
_OWN = [
    "array",
    "chdir",
    "error",
    "gpus-per-socket",
    "gpus-per-task",
    "job-name",
    "no-requeue",
    "ntasks",
    "ntasks-per-core",
]
_OWN += ["ntasks-per-gpu", "ntasks-per-node", "ntasks-per-socket", "open-mode", "output", "parsable", "requeue"]
_OWN += ["signal", "test-only", "time-min", "wrap"]
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


@dataclass(frozen=True)
class SlurmOptions:
    """Of the job. time: as sbatch takes it. max_restarts: after crashes. sbatch: more options by their long names; ""
    for one without a value."""

    nodes: int
    gpus_per_node: int = 8
    partition: str | None = None
    time: str | None = None
    account: str | None = None
    cpus_per_node: int | None = None
    max_restarts: int = 0
    setup: str = ""
    sbatch: Mapping[str, str] = field(default_factory=dict)


def launch_slurm(config_file: Path, overrides: Sequence[str], options: SlurmOptions, print_only: bool) -> str:
    """Submit the job; returns a line that says what was done, or with print_only the script, and nothing is written.

    Raises ConfigError when the run or the options are wrong or Slurm is not here, RunError when sbatch refuses.
    """
    config = load_run_config(config_file, overrides)
    check_effects(config, config_file)
    _check(config, options)
    folder = config.folder.resolve() / "slurm"
    text = render(config_file, overrides, config.name, folder, options)
    if print_only:
        return text
    if shutil.which("sbatch") is None:
        raise ConfigError("launch slurm: no sbatch on PATH: run this where jobs can be submitted, or look with --print")
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "job.sbatch"
    write_file(script, text)
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it says nothing"]
        raise RunError(f"sbatch refused {script} (exit code {done.returncode}): {lines[-1]}")
    job = done.stdout.strip().split(";")[0]
    return f"job {job} submitted: {script}, log in {folder / f'{job}.log'}"


def parse_sbatch(given: Sequence[str]) -> dict[str, str]:
    """`qos=high` and `exclusive` by name, "" for one without a value.

    Raises ConfigError for one with an empty value, and for one given twice, of which sbatch would take one."""
    options: dict[str, str] = {}
    for option in given:
        key, equals, value = option.partition("=")
        key = key.removeprefix("--")
        if not key:
            raise ConfigError(f"--sbatch: {option!r}: expected an option of sbatch, such as qos=high or exclusive")
        if equals and not value:
            raise ConfigError(f"--sbatch: {option}: has no value: give one, or say --sbatch {key}")
        if key in options:
            raise ConfigError(f"--sbatch: {key}: is given twice: sbatch takes one")
        options[key] = value
    return options


def render(config_file: Path, overrides: Sequence[str], name: str, folder: Path, options: SlurmOptions) -> str:
    """The job script: #SBATCH lines of submitit over configs/launch/slurm.sbatch. folder: for the logs."""
    if find_spec("submitit") is None:
        raise ConfigError("launch slurm: submitit is not installed: pip install -r requirements.txt")
    from submitit.slurm.slurm import _make_sbatch_string

    # Not what a link leads to: `defaults` and `imports` in the file are relative to where it is named.
    command = [str(ROOT / "main.py"), "train", str(config_file.absolute()), *overrides]
    values = {
        "FOLDER": shlex.quote(str(Path.cwd())),
        "ROOT": shlex.quote(str(ROOT)),
        "SETUP": options.setup,
        "PYTHON": shlex.quote(sys.executable),
        "PROCESSES": str(options.gpus_per_node),
        "COMMAND": shlex.join(command),
        "PREEMPTED": str(EXIT_PREEMPTED),
        "LEAD": str(LEAD),
        "MAX_RESTARTS": str(options.max_restarts),
        "CRASHES": shlex.quote(str(folder / "crashes")),
    }
    body = TEMPLATE.read_text()
    for key, value in values.items():
        body = body.replace(f"@{key}@", value)
    more = {"signal": f"USR2@{LEAD}", "requeue": True, "output": str(folder / "%j.log")}
    return _make_sbatch_string(
        command=body,
        folder=folder,
        job_name=name,
        nodes=options.nodes,
        ntasks_per_node=1,
        gpus_per_node=options.gpus_per_node,
        # A rank trains, a process loads for it, evaluations have room: Slurm's own default is one core in all.
        cpus_per_task=options.cpus_per_node or CPUS_PER_GPU * options.gpus_per_node,
        partition=options.partition,
        account=options.account,
        time=options.time,  # pyright: ignore[reportArgumentType]  # sbatch's own forms pass, too; None: the cluster's
        wckey=None,  # pyright: ignore[reportArgumentType]  # "submitit" by default, which a cluster may not know
        stderr_to_stdout=True,
        additional_parameters={**more, **{key: value or True for key, value in options.sbatch.items()}},
        use_srun=False,
    )


def _check(config: RunConfig, options: SlurmOptions) -> None:
    """Raise ConfigError for what would fail in the job."""
    if options.time is not None:
        seconds = _seconds(options.time)
        if seconds is None:
            raise ConfigError(f"--time: {options.time!r}: expected minutes, HH:MM:SS or D-HH:MM:SS")
        if seconds <= 2 * LEAD:
            raise ConfigError(
                f"--time: {options.time}: the run is asked to stop {LEAD} s before the limit: give more than "
                f"{2 * LEAD // 60} minutes"
            )
    for name, value in (("partition", options.partition), ("account", options.account)):
        if value is not None and not value.strip():
            raise ConfigError(f"--{name}: is empty: give one, or leave it out")
    for key in options.sbatch:
        _check_sbatch(key)
    check_rows(config, options.nodes, options.gpus_per_node)
    dry_run(config, plain_console(quiet=True), options.nodes * options.gpus_per_node)


def check_rows(config: RunConfig, nodes: int, processes: int) -> None:
    """Raise ConfigError for batches that so many processes on each node cannot divide among them."""
    ranks = nodes * processes
    loader = PhasePlan(config).loader_config(config)
    for rows in dict.fromkeys(phase.global_batch_size for phase in loader.phases):
        if rows % ranks:
            raise ConfigError(
                f"phases: batches of {rows} rows cannot be divided among {ranks} ranks ({nodes} nodes x {processes} "
                "GPUs): change one of them"
            )


def _check_sbatch(key: str) -> None:
    """Raise ConfigError for an option that is none, or that says otherwise what the job script says."""
    if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
        raise ConfigError(f"--sbatch: {key}: is no long option of sbatch: give NAME=VALUE or NAME, such as qos=high")
    # sbatch takes the beginning of an option for the option.
    for name in (*_FLAGS, *_OWN):
        if name.startswith(key):
            fix = f"use {_FLAGS[name]}" if name in _FLAGS else "leave it out: the job script decides it"
            raise ConfigError(f"--sbatch: {key}: {fix}")


def _seconds(time: str) -> int | None:
    """Of sbatch's --time: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. None for anything else."""
    match = _TIME.fullmatch(time)
    if match is None:
        return None
    parts = [int(part) for part in match.group("first", "second", "third") if part is not None]
    if match["days"] is not None:
        units = [3600, 60, 1]
        return int(match["days"]) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))
    units = [[60], [60, 1], [3600, 60, 1]][len(parts) - 1]
    return sum(part * unit for part, unit in zip(parts, units, strict=True))
