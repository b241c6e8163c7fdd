"""Jobs on this machine: at most so many at once, on cores of their own, and none is left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from flexbert_core.schema import ConfigError
from jobs.base import Job, explain
from jobs.local import LocalJobs
from tests.helpers.runs import ROOT

REPORT = (
    "import os, time; start = time.time(); time.sleep({seconds}); print(start, time.time(), os.sched_getaffinity(0))"
)


def executor(**config: Any) -> LocalJobs:
    return LocalJobs(LocalJobs.Config(**config))


def job(folder: Path, name: str, code: str) -> Job:
    return Job(name, [sys.executable, "-c", code], folder / f"{name}.log")


def test_as_many_at_once_as_was_said(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        pytest.skip("needs two cores")
    jobs = [job(tmp_path, f"j{number}", REPORT.format(seconds=0.4)) for number in range(4)]
    seen: list[tuple[str, int | None]] = []
    executor(at_once=2, cores_per_job=1).run(jobs, lambda each, code: seen.append((each.name, code)))
    assert sorted(name for name, code in seen if code == 0) == ["j0", "j1", "j2", "j3"]
    spans = [list(map(float, each.log.read_text().split()[:2])) for each in jobs]
    at_once = [sum(start <= moment < end for start, end in spans) for moment, _ in spans]
    assert max(at_once) == 2
    assert len({each.log.read_text().split(maxsplit=2)[2] for each in jobs}) == 2  # two cores, one each


def test_one_that_fails_stops_none_and_is_explained(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "bad", "print('so'); raise SystemExit(3)"), job(tmp_path, "good", "print('fine')")]
    jobs.append(job(tmp_path, "killed", "import os; os.kill(os.getpid(), 9)"))
    codes = {}
    executor().run(jobs, lambda each, code: codes.update({each.name: code}))
    assert codes == {"bad": 3, "good": 0, "killed": -9}
    assert explain(jobs[0], 3) == f"bad: exit code 3: so (log: {tmp_path}/bad.log)"
    assert explain(jobs[2], -9) == f"killed: killed by signal 9: it printed nothing (log: {tmp_path}/killed.log)"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_none_outlives_the_command(tmp_path: Path, number: int) -> None:
    code = textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from jobs.base import Job
        from jobs.local import LocalJobs
        sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
        jobs = [Job(f"j{{n}}", [sys.executable, "-c", sleeper], Path({str(tmp_path)!r}) / f"j{{n}}.log") for n in range(2)]
        LocalJobs(LocalJobs.Config(at_once=2, cores_per_job=1)).run(jobs, lambda *_: None)
    """)
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    logs = [tmp_path / f"j{n}.log" for n in range(2)]
    while not all(log.exists() and log.read_text().strip() for log in logs):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    process.wait()
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(int(log.read_text())) for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_more_than_there_is_is_refused() -> None:
    cores = len(os.sched_getaffinity(0))
    with pytest.raises(
        ConfigError, match=rf"executor\.at_once: 2 jobs of {cores} cores, but .* {cores}: give 1 or less$"
    ):
        executor(at_once=2, cores_per_job=cores).check()
    with pytest.raises(ConfigError, match=rf"executor\.cores_per_job: {cores + 1}, but .* {cores}: give fewer$"):
        executor(cores_per_job=cores + 1).check()


def test_gpus_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    places = executor(gpus_per_job=2).places()
    assert [place["gpus"] for place in places] == [["4", "5"], ["6", "7"]]
    with pytest.raises(ConfigError, match=r"executor\.at_once: 3 jobs of 2 GPUs, but this machine shows 4: give 2"):
        executor(gpus_per_job=2, at_once=3).check()


def test_either_all_jobs_have_a_gpu_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has none would be trained on another device than those it is compared with."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(
        ConfigError, match=r"at_once: 2 jobs of 1 GPUs, but .* shows 1: give 1 or less, or gpus_per_job: 0"
    ):
        executor(at_once=2, cores_per_job=1).check()
    on_cpu = executor(at_once=2, cores_per_job=1, gpus_per_job=0)
    assert [place["gpus"] for place in on_cpu.places()] == [[], []]


def test_gpus_for_which_cores_are_too_few_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """at_once, which is not said, is that of the GPUs."""
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(str(number) for number in range(cores + 1)))
    with pytest.raises(
        ConfigError, match=rf"at_once: {cores + 1} jobs of 1 cores, but .* {cores}: give {cores} or less"
    ):
        executor().check()
    assert all(place["cores"] for place in executor(at_once=cores).places())
