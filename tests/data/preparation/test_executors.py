"""Executors: the same dataset from Slurm (stub programs that really run the jobs) and from a real local Ray."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from datatrove.executor.local import LocalPipelineExecutor

from data.preparation.dataset import load_prepare_config
from data.preparation.executors.base import RecordsFailures
from data.preparation.executors.slurm import JOBS_FILE
from data.preparation.writing import Part
from flexbert_core.schema import ConfigError, RunError
from tests.helpers.preparing import config_file, documents, files, interrupt, run, write_jsonl

# A cluster in a folder: JOBS/ID holds name and process of each job; sbatch runs its array tasks, one after the other, in
# the background. What the real ones print and return (Slurm 23.11 manual pages) is all that the caller may rely on.
STUBS = {
    "sbatch": """
import os, re, subprocess, sys
from pathlib import Path
jobs, arguments = Path(os.environ["FAKE_SLURM"]), sys.argv[1:]
script = Path(arguments[-1])
text = script.read_text()
options = dict(re.findall(r"#SBATCH --([a-z-]+)=?(.*)", text))
if options["partition"] != "cpu":
    print("sbatch: error: invalid partition specified: " + options["partition"], file=sys.stderr)
    print("sbatch: error: Batch job submission failed: Invalid partition name specified", file=sys.stderr)
    sys.exit(1)
exported = dict(pair.split("=", 1) for a in arguments if a.startswith("--export=") for pair in a[9:].split(",") if "=" in pair)
number = str(len(list(jobs.iterdir())) + 1)
last = int(re.match(r"0-(\\d+)", options["array"])[1])
runner = f'''
import os, subprocess, sys
for task in range({last} + 1):
    log = {options["output"]!r}.replace("%A", {number!r}).replace("%a", str(task))
    environment = {{**os.environ, **{exported!r}, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": "{number}"}}
    with open(log, "w") as file:
        subprocess.run(["bash", {str(script)!r}], env=environment, stdout=file, stderr=file)
os.unlink({str(jobs / number)!r})
'''
copy = script.with_name(f"copy-{number}.slurm")  # Slurm takes a copy of the script, too
copy.write_text(text)
process = subprocess.Popen([sys.executable, "-c", runner.replace(str(script), str(copy))], start_new_session=True,
    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
(jobs / "log").open("a").write(f"{number} {options['job-name']} {last + 1} {options.get('account')}\\n")
(jobs / number).write_text(f"{options['job-name']} {process.pid}")
print(f"Submitted batch job {number}")
""",
    "squeue": """
import os, sys
from pathlib import Path
name = sys.argv[sys.argv.index("--name") + 1]
for job in Path(os.environ["FAKE_SLURM"]).glob("[0-9]*"):
    found, pid = job.read_text().split()
    if found == name and os.path.exists(f"/proc/{pid}"):
        print(job.name)
""",
    "scancel": """
import os, signal, sys
from pathlib import Path
name = sys.argv[sys.argv.index("--name") + 1]
for job in Path(os.environ["FAKE_SLURM"]).glob("[0-9]*"):
    found, pid = job.read_text().split()
    if found == name:
        os.killpg(int(pid), signal.SIGKILL)
        job.unlink()
""",
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's programs first on PATH; gives the folder of their jobs."""
    programs, jobs = tmp_path / "programs", tmp_path / "jobs"
    for folder in (programs, jobs):
        folder.mkdir()
    for name, code in STUBS.items():
        (programs / name).write_text(f"#!{sys.executable}\n{code}")
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(jobs))
    monkeypatch.setattr("data.preparation.executors.slurm.SETTLE_SECONDS", 1.0)
    return jobs


SLURM = {
    "name": "slurm",
    "partition": "cpu",
    "poll_seconds": 0.1,
    "max_array_size": 1,
    "tasks_per_job": 2,
    "sbatch_args": {"account": "nlp"},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("executors")
    texts = documents(120)
    write_jsonl(folder / "a" / "1.jsonl", texts[:80])
    write_jsonl(folder / "b" / "1.jsonl", texts[70:])
    return folder


@pytest.fixture(scope="module")
def expected_plain(corpus: Path) -> dict[str, bytes]:
    return files(run(plain(corpus), f"output={corpus / 'plain'}"))


@pytest.fixture(scope="module")
def expected(corpus: Path) -> dict[str, bytes]:
    return files(run(small(corpus), f"output={corpus / 'local'}"))


def plain(corpus: Path, **changes: object) -> Path:
    """Two streams of one task each, with the stages that every config has."""
    return config_file(corpus, **changes)


def small(corpus: Path, **changes: object) -> Path:
    """The same; in the first near-duplicates are looked for, in 4 tasks."""
    streams = {name: {"source": {"name": "jsonl", "paths": [str(corpus / name)]}} for name in ("a", "b")}
    filters = [{"name": "length", "min_characters": 20}, {"name": "minhash", "buckets": 4, "hashes_per_bucket": 4}]
    return config_file(corpus, streams={"a": {**streams["a"], "filters": filters}, "b": streams["b"]}, **changes)


def prepare_on(path: Path, *overrides: str) -> Path:
    """With the config's own executor."""
    from data.preparation.dataset import prepare

    config = load_prepare_config(path, list(overrides))
    prepare(config)
    return Path(config.output)


@pytest.mark.slow
def test_slurm_makes_the_same_dataset(corpus: Path, expected: dict[str, bytes], cluster: Path, tmp_path: Path) -> None:
    output = prepare_on(small(corpus, executor=SLURM), f"output={tmp_path / 'out'}")
    assert files(output) == expected
    log = [line.split() for line in (cluster / "log").read_text().splitlines()]
    # two tasks a job, one job an array: only the 4 buckets of `pairs` take two arrays
    assert [line[1].rpartition("-")[2] for line in log] == [
        "scan",
        "signatures",
        "pairs",
        "pairs",
        "clusters",
        "tokenise",
    ]
    assert {line[2] for line in log} == {"1"}
    assert {line[3] for line in log} == {"nlp"}
    assert len({line[1] for line in log}) == 5  # a name for each stage


@pytest.mark.slow
def test_slurm_task_that_fails_is_one_line_and_can_be_repeated(
    corpus: Path, expected_plain: dict[str, bytes], cluster: Path, tmp_path: Path
) -> None:
    good = (corpus / "b" / "1.jsonl").read_bytes()
    path = plain(corpus, executor=SLURM)
    try:
        (corpus / "b" / "1.jsonl").write_bytes(good + b"{")
        message = (
            r"^reading: 1 of 2 tasks are not done, the first is 1: .*b/1\.jsonl:51: not valid JSON.* \(logs: .*\.out\)"
        )
        with pytest.raises(RunError, match=message):
            prepare_on(path, f"output={tmp_path / 'out'}")
    finally:
        (corpus / "b" / "1.jsonl").write_bytes(good)
    assert files(prepare_on(path, f"output={tmp_path / 'out'}")) == expected_plain


def test_slurm_refuses_the_job(corpus: Path, cluster: Path, tmp_path: Path) -> None:
    message = r"^sbatch refused the job \(exit code 1\): sbatch: error: .*: Invalid partition name specified$"
    with pytest.raises(RunError, match=message):
        prepare_on(small(corpus, executor={**SLURM, "partition": "gpuu"}), f"output={tmp_path / 'out'}")


def test_another_executor_waits_for_no_job_beside_it(
    corpus: Path, expected_plain: dict[str, bytes], cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs of a killed command hold no lock: two would write into one folder."""
    output = f"output={tmp_path / 'out'}"
    with pytest.raises(RunError, match="sbatch refused"):
        prepare_on(plain(corpus, executor={**SLURM, "partition": "gpuu"}), output)
    (name,) = (tmp_path / "out" / ".work" / JOBS_FILE).read_text().split()
    assert name.endswith("-scan")
    job = cluster / "1"
    job.write_text(f"{name} {os.getpid()}")
    with pytest.raises(RunError, match=rf"out: Slurm job {name} of an earlier command .* or scancel --name {name}$"):
        run(plain(corpus), output)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(
            RunError, match=r"without squeue on PATH nobody can say .* delete .*slurm-jobs when it does"
        ):
            run(plain(corpus), output)
    job.unlink()
    assert files(run(plain(corpus), output)) == expected_plain


def test_a_part_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    """A training run may read it already; another is replaced."""
    inodes = []
    for tokens in ([1, 2], [1, 2], [1, 3]):
        part = Part(tmp_path / "part-00000", 384, 16384, 64)
        part.add(np.array(tokens, np.uint16), 5)
        part.finish()
        assert [shard["tokens"] for shard in part.report()["shards"]] == [2]
        assert [path.name for path in tmp_path.iterdir()] == ["part-00000"]
        inodes.append((tmp_path / "part-00000" / "shard.00000.mds").stat().st_ino)
    assert inodes[0] == inodes[1] != inodes[2]


class Elsewhere(RecordsFailures, LocalPipelineExecutor):
    """An executor whose processes start in another folder than the command."""


def test_relative_paths_are_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(data: object, rank: int, world_size: int) -> None:
        Path("here").touch()

    for name in ("command", "worker"):
        (tmp_path / name).mkdir()
    executor = Elsewhere([write], tasks=1, logging_dir=str(tmp_path / "logs"))  # pyright: ignore[reportArgumentType]
    executor.folder = str(tmp_path / "command")
    monkeypatch.chdir(tmp_path / "worker")
    executor.run()
    assert (tmp_path / "command" / "here").exists()


SCRIPT = """
import sys
from data.preparation.dataset import load_prepare_config, prepare

if __name__ == "__main__":
    prepare(load_prepare_config(sys.argv[1], [f"output={sys.argv[2]}"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_command_that_is_stopped_while_jobs_run(
    corpus: Path, expected_plain: dict[str, bytes], cluster: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """Killed: the jobs go on, and the next command waits for them. Interrupted: they are cancelled."""
    (tmp_path / "script.py").write_text(SCRIPT)
    path = plain(corpus, executor=SLURM)
    command = [sys.executable, str(tmp_path / "script.py"), str(path), str(tmp_path / "out")]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(Path.cwd())}, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not list(cluster.glob("[0-9]*")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)  # until the command is waiting
    process.send_signal(how)
    process.wait(30)
    assert len(list(cluster.glob("[0-9]*"))) == (1 if how == signal.SIGKILL else 0)
    if how == signal.SIGKILL:
        with pytest.raises(
            RunError, match=r"out: Slurm job prepare-\w+-scan of an earlier command is still at work here"
        ):
            run(path, f"output={tmp_path / 'out'}")
    assert files(prepare_on(path, f"output={tmp_path / 'out'}")) == expected_plain
    names = [line.split()[1] for line in (cluster / "log").read_text().splitlines()]
    scans = sum(name.endswith("-scan") for name in names)
    assert scans == (1 if how == signal.SIGKILL else 2)


def test_slurm_without_its_programs(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"prepare\.yaml: executor: slurm: no sbatch on PATH: .*executor: local$"):
        prepare_on(small(corpus, executor=SLURM), f"output={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_ray_without_the_package(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"executor: ray: .* pip install -r requirements-data\.txt, or use"):
        prepare_on(small(corpus, executor="ray"), f"output={tmp_path / 'out'}")


@pytest.mark.parametrize(
    ("executor", "message"),
    [
        ("slrum", "prepare.yaml: executor: unknown executor 'slrum', did you mean 'slurm'?"),
        ("slurm", "prepare.yaml: executor.partition: is required and missing"),
        (
            {"name": "local", "workers": 0},
            "prepare.yaml: executor.workers: should be greater than or equal to 1, got 0",
        ),
        (
            {"name": "ray", "cpu_per_task": 2},
            "prepare.yaml: executor: unknown key 'cpu_per_task', did you mean 'cpus_per_task'?",
        ),
    ],
)
def test_config_faults(corpus: Path, executor: object, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_prepare_config(small(corpus, executor=executor))
    assert str(error.value).endswith(f"/{message}")


def test_executor_is_no_part_of_the_dataset(
    corpus: Path, expected_plain: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was begun elsewhere can be finished here."""
    output = f"output={tmp_path / 'out'}"
    interrupt(plain(corpus, executor=SLURM), monkeypatch, output)
    assert files(prepare_on(plain(corpus, executor={"name": "local", "workers": 1}), output)) == expected_plain


@pytest.mark.slow
def test_ray_makes_the_same_dataset(
    corpus: Path,
    expected_plain: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    pytest.importorskip("ray", reason="ray is in requirements-data.txt")
    # its sockets' paths may not be longer than 107 bytes
    short = tempfile.mkdtemp(prefix="ray")
    request.addfinalizer(lambda: shutil.rmtree(short, ignore_errors=True))
    monkeypatch.setenv("RAY_TMPDIR", short)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # none was asked for: Ray of this machine
    executor = {"name": "ray", "mem_per_cpu_gb": 0.1, "workers": 2}
    good = (corpus / "b" / "1.jsonl").read_bytes()
    try:
        (corpus / "b" / "1.jsonl").write_bytes(good + b"{")
        with pytest.raises(
            RunError, match=r"^reading: 1 of 2 tasks are not done, the first is 1: .*1\.jsonl:51: not val"
        ):
            prepare_on(plain(corpus, executor=executor), f"output={tmp_path / 'out'}")
    finally:
        (corpus / "b" / "1.jsonl").write_bytes(good)
    assert files(prepare_on(plain(corpus, executor=executor), f"output={tmp_path / 'out'}")) == expected_plain
