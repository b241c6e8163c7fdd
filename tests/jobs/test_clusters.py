"""Jobs on clusters: Slurm's programs stood in for by scripts that run arrays here, and a real Ray on this machine."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flexbert_core.schema import ConfigError, RunError
from jobs.base import Job, explain, note_end, told
from jobs.ray import RayJobs
from jobs.slurm import SlurmJobs
from tests.helpers.process import ROOT
from tests.helpers.remote import until

# What the real ones print and take (Slurm 23.11 manual pages) is all that submitit may rely on.
STUBS = {
    "sbatch": """
import os, re, subprocess, sys
from pathlib import Path
jobs, script = Path(os.environ["FAKE_SLURM"]), Path(sys.argv[-1])
options = dict(re.findall(r"#SBATCH --([a-z-]+)=?(.*)", script.read_text()))
(jobs / "options.json").write_text(__import__("json").dumps(options))
if options["partition"] != "gpu":
    print("sbatch: error: invalid partition specified: " + options["partition"], file=sys.stderr)
    sys.exit(1)
last = int(re.match(r"0-([0-9]+)", options["array"])[1])
for task in range(last + 1):
    environment = {**os.environ, "SLURM_JOB_ID": f"7{task}", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)}
    environment |= {"SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0"}
    environment |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    subprocess.Popen(["bash", str(script)], env=environment, start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 7")
""",
    "srun": """
import os, subprocess, sys
arguments = [each for each in sys.argv[1:] if not each.startswith("--")]
skip = [i for i, each in enumerate(sys.argv[1:]) if each in ("--output", "--error")]
values = {sys.argv[1:][i + 1] for i in skip}
sys.exit(subprocess.run([each for each in arguments if each not in values]).returncode)
""",
    "sacct": "print('JobID|State|NodeList'); print('7_[0-9]|RUNNING|here')",
    "squeue": "",
    "scancel": "",
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    programs, jobs = tmp_path / "programs", tmp_path / "jobs"
    for folder in (programs, jobs):
        folder.mkdir()
    for name, code in STUBS.items():
        (programs / name).write_text(f"#!{sys.executable}\n{code}")
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(jobs))
    monkeypatch.chdir(tmp_path)  # the project need not be where the command is given
    return jobs


def jobs_in(folder: Path) -> list[Job]:
    code = "import os; print('hello', os.environ['MARK']); raise SystemExit({})"
    return [
        Job(
            f"j{number}", [sys.executable, "-c", code.format(number)], folder / f"j{number}.log", {"MARK": f"m{number}"}
        )
        for number in range(2)
    ]


@pytest.mark.slow
def test_an_array_of_slurm(cluster: Path, tmp_path: Path) -> None:
    config = SlurmJobs.Config(partition="gpu", minutes=9, mem_gb=1.5, sbatch_args={"account": "nlp"}, poll_seconds=0.1)
    executor = SlurmJobs(config)
    executor.check()
    codes: dict[str, int | None] = {}
    executor.run(jobs_in(tmp_path / "logs"), lambda job, code: codes.update({job.name: code}))
    assert codes == {"j0": 0, "j1": 1}
    assert [(tmp_path / "logs" / f"j{number}.log").read_text() for number in range(2)] == ["hello m0\n", "hello m1\n"]
    options = json.loads((cluster / "options.json").read_text())
    assert options.items() >= {"time": "9", "mem": "1536M", "account": "nlp", "gpus-per-node": "1"}.items()
    with pytest.raises(RunError, match="executor: slurm: sbatch refused: .*invalid partition specified: cpu"):
        SlurmJobs(SlurmJobs.Config(partition="cpu")).run(jobs_in(tmp_path / "logs"), lambda *_: None)


def test_a_job_on_a_node_ends_with_the_process_that_has_started_it(tmp_path: Path) -> None:
    """As when Ray or Slurm kills that: the job would keep its GPUs, and the run folder locked."""
    log = tmp_path / "job.log"
    sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    job = [[sys.executable, "-c", sleeper], str(log), {}, str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-c", f"from jobs.base import run_here; run_here(*{job!r})"], cwd=ROOT)
    until(lambda: log.exists() and log.read_text().strip(), 60)
    process.kill()
    process.wait()
    until(lambda: not psutil.pid_exists(int(log.read_text())))


def test_why_a_node_ended_a_job_is_the_last_that_is_told_of_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And not what an older attempt printed; where the log cannot be written, it is said at once."""
    job = Job("one", [], tmp_path / "one.log")
    job.log.write_text("of an older attempt\n")
    note_end(job.log, "ray: killed for memory")
    assert explain(job, 1) == f"one: exit code 1: ray: killed for memory (log: {job.log})"
    note_end(job.log / "below", "ray: killed")
    assert capfd.readouterr().err == f"{job.log}/below: ray: killed\n"


def test_no_slurm_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="executor: slurm: no sbatch on PATH: .* or use executor: local"):
        SlurmJobs(SlurmJobs.Config(partition="gpu")).check()


@pytest.mark.slow
def test_tasks_of_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """On this machine, whatever cluster the environment names; that it is not used is said."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    executor = RayJobs(RayJobs.Config())
    executor.check()
    codes: dict[str, int | None] = {}
    executor.run(jobs_in(tmp_path), lambda job, code: codes.update({job.name: code}))
    assert codes == {"j0": 0, "j1": 1}
    assert (tmp_path / "j1.log").read_text() == "hello m1\n"
    assert "executor: ray: RAY_ADDRESS=127.0.0.1:1 is not used: Ray starts on this machine" in caplog.text


@pytest.mark.slow
def test_a_task_of_ray_that_ray_ends_is_told_with_the_reason(tmp_path: Path) -> None:
    kill = "import os; os.kill(os.getppid(), 9)"  # the worker that runs it, as the monitor of memory does
    commands = {"killed": [sys.executable, "-c", kill], "missing": [str(tmp_path / "no-such-program")]}
    jobs = [Job(name, command, tmp_path / f"{name}.log") for name, command in commands.items()]
    said: dict[str, str] = {}
    RayJobs(RayJobs.Config()).run(jobs, lambda job, code: said.update({job.name: explain(job, code or 0)}))
    assert re.match(r"killed: exit code 1: ray: The worker died unexpectedly", said["killed"]), said
    assert said["missing"].startswith("missing: exit code 1: ray: FileNotFoundError: "), said


CLUSTER = """
import os, sys, time
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
print(ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False).address_info["address"], flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_relative_paths_mean_the_same_on_a_cluster_of_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which was started in another folder."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    monkeypatch.chdir(here)
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER], cwd=there, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as head:
        assert head.stdout is not None
        address = next(line.strip() for line in head.stdout if re.fullmatch(r"[0-9.]+:[0-9]+", line.strip()))
        said: list[str] = []
        job = Job("one", [sys.executable, "-c", "import os; print(os.getcwd())"], Path("logs/one.log"))
        executor = RayJobs(RayJobs.Config(address=address))
        executor.run([job], told([job], said.append, executor.begun))
    assert (here / "logs/one.log").read_text() == f"{here}\n"
    assert said == ["queued  one", "done  one  (0 jobs left)"]
