"""Real SIGKILLs: of the whole run at many moments, and of one worker."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.preparation.dataset import load_prepare_config, prepare
from data.store.shards import open_stream
from tests.helpers.preparing import config_file, documents, files, write_jsonl

SCRIPT = """
import sys
from flexbert_core.schema import RunError
from data.preparation.dataset import load_prepare_config, prepare

if __name__ == "__main__":
    try:
        prepare(load_prepare_config(sys.argv[1], [f"output={sys.argv[2]}"]), workers=2)
    except RunError as error:
        sys.exit(f"RunError: {error}")
"""

# Globs below the output folder: the run is killed as soon as one matches for the first time.
MOMENTS = [
    "prepare.json",
    ".work/tasks",
    ".work/scan/00003.npz",
    ".work/filters/a-2/signatures/bucket_003/00002.minhash.sig",
    ".work/logs/a-2-pairs/completions/00001",
    ".work/filters/a-2/clusters/*",
    ".work/plan/00001.npz",
    "tokenizer",
    "*/train/.part-*.partial",
    ".work/done/00000.json",
    ".work/logs/tokenise/completions/00005",
    "a/train/index.json",
    "a/train/stream.json",
    "b/train/index.json",
]


def config(corpus: Path) -> Path:
    """Two streams; in the first one filter of each kind."""
    streams: dict[str, Any] = {
        name: {"source": {"name": "jsonl", "paths": [str(corpus / name)]}} for name in ("a", "b")
    }
    streams["a"]["filters"] = [
        {"name": "length", "min_characters": 100},
        {"name": "minhash", "buckets": 4, "hashes_per_bucket": 4},
    ]
    return config_file(corpus, streams=streams)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    texts = documents(1200)
    for part in range(8):
        near = [f"{text} and a tail" for text in texts[100 * part : 100 * part + 5]]
        write_jsonl(folder / "a" / f"{part}.jsonl", texts[100 * part : 100 * part + 100] + near)
    for part in range(4):
        write_jsonl(folder / "b" / f"{part}.jsonl", texts[700 + 120 * part : 840 + 120 * part])
    (folder / "script.py").write_text(SCRIPT)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path) -> dict[str, bytes]:
    prepare(load_prepare_config(config(corpus), [f"output={corpus / 'whole'}"]), workers=1)
    filtered = open_stream(corpus / "whole" / "a" / "train").manifest.filtered
    assert min(filtered.values()) > 10
    return files(corpus / "whole")


class Run:
    """A prepare run in its own process; it and all its descendants can be found by a mark in their environment."""

    def __init__(self, corpus: Path, output: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.output = output
        command = [sys.executable, str(corpus / "script.py"), str(config(corpus)), str(output)]
        environment = {**os.environ, "RUN_MARK": self.mark, "PYTHONPATH": str(Path.cwd())}
        self.stderr = output.with_name(f"{self.mark}.stderr")
        with self.stderr.open("w") as file:
            self.process = subprocess.Popen(command, env=environment, stderr=file)

    def kill_at(self, moment: str) -> None:
        while self.process.poll() is None and not any(self.output.glob(moment)):
            time.sleep(0.0005)
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def alive(self) -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:  # gone, or not ours
                continue
        return found

    def wait_until_all_ended(self) -> None:
        deadline = time.monotonic() + 10
        while alive := self.alive():
            assert time.monotonic() < deadline, f"processes {alive} outlive the run"
            time.sleep(0.05)


@pytest.mark.slow
def test_killed_again_and_again(corpus: Path, uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    """One dataset, killed at each moment in turn and then left to finish: every file is as if nothing had happened."""
    output = tmp_path / "out"
    missed = []
    for moment in MOMENTS:
        run = Run(corpus, output)
        run.kill_at(moment)
        if run.process.returncode != -signal.SIGKILL:
            missed.append((moment, run.process.returncode, run.stderr.read_text()))
        run.wait_until_all_ended()
    assert not missed
    done = {path: path.stat().st_mtime_ns for path in (output / ".work/logs/tokenise/completions").iterdir()}
    parts = {path: path.stat().st_mtime_ns for path in output.glob("*/*/part-*")}
    assert done
    last = Run(corpus, output)
    assert last.process.wait(120) == 0
    assert files(output) == uninterrupted
    assert {path: path.stat().st_mtime_ns for path in output.glob("*/*/part-*")} == parts  # none was made again


PARENT = """
import os, subprocess, sys, time
if sys.argv[1] != "not said":
    os.environ["FLEXBERT_PREPARE_PID"] = sys.argv[1] or str(os.getpid())
code = "import data.preparation.preload, time; print('tied', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=sys.stdout)
print(child.stdout.readline() or child.wait(), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("claimed", "said"),
    [("", "b'tied\\n'"), ("1", "1"), ("not said", "b'tied\\n'")],
    ids=["parent alive", "ended before", "started again"],
)
def test_the_parent_of_workers_ends_with_its_own(claimed: str, said: str) -> None:
    """Whatever it imports: here it would sleep for ten minutes, with the pipe that is read to its end open."""
    process = subprocess.Popen([sys.executable, "-c", PARENT, claimed], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == said
    process.kill()
    assert process.communicate(timeout=60)[0] == ""


@pytest.mark.slow
def test_killed_worker_is_an_error_and_not_a_hang(
    corpus: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    run = Run(corpus, tmp_path / "out")
    lines = tmp_path / "out" / ".work" / "progress.npy"
    while run.process.poll() is None:
        try:
            workers = set(np.load(lines)[:, 1].tolist()) - {0, run.process.pid}
        except (OSError, ValueError, EOFError):
            continue
        if workers:
            os.kill(workers.pop(), signal.SIGKILL)
            break
    run.process.wait(60)
    stderr = run.stderr.read_text()
    assert run.process.returncode == 1
    assert "was killed (out of memory?): run the same command again to go on" in stderr
    assert "Traceback" not in stderr
    run.wait_until_all_ended()
    assert Run(corpus, tmp_path / "out").process.wait(120) == 0
    assert files(tmp_path / "out") == uninterrupted


def test_second_run_on_the_same_folder_is_refused(corpus: Path, tmp_path: Path) -> None:
    run = Run(corpus, tmp_path / "out")
    while not (tmp_path / "out" / ".work" / "tasks").exists():
        time.sleep(0.001)
    second = Run(corpus, tmp_path / "out")
    second.process.wait(60)
    stderr = second.stderr.read_text()
    assert (second.process.returncode, stderr.strip()) == (
        1,
        f"RunError: {tmp_path / 'out'}: process {run.process.pid} is preparing this folder: wait for it to end, or stop it",
    )
    run.kill_at("prepare.json")
    run.wait_until_all_ended()
