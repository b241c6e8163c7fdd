"""A process that dies on one node: the job ends on every node, and each names it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from tests.helpers.ports import free_port
from tests.helpers.runs import GATE, ROOT, environment, open_gate, rank
from tests.helpers.tiny import write_config
from training.first_failure import Failure, agreed, first, seen
from training.flight_recorder import record


@pytest.mark.parametrize(
    ("code", "how"), [(-9, "was killed by SIGKILL"), (1, "ended with exit code 1"), (-77, "ended with exit code -77")]
)
def test_a_failure_is_said_in_a_line(code: int, how: str) -> None:
    process = ProcessFailure(local_rank=1, pid=1, exitcode=code, error_file="")
    assert seen(5, process).text == f"rank 5 on {socket.gethostname()} {how}"


def test_nodes_agree_on_the_first() -> None:
    """Whichever comes to the store first, and when one says nothing, after the time they wait."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    failures = [Failure(2.0, "rank 0 ended with exit code 1"), Failure(1.0, "rank 1 was killed by SIGKILL")]
    found: dict[int, Failure] = {}

    def node(number: int) -> None:
        client = TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
        found[number] = agreed(failures[number], client, 2, 20)

    threads = [threading.Thread(target=node, args=(number,)) for number in range(2)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start < 15
    assert found == {0: failures[1], 1: failures[1]}
    alone = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert agreed(failures[0], alone, 2, 0.3) == failures[0]


def test_a_node_whose_head_is_gone_says_what_it_knows() -> None:
    own = Failure(1.0, "rank 1 ended with exit code 1")
    assert first(own, ["--standalone", "--nproc-per-node=2", "main.py"]) == own
    assert first(own, ["--nnodes=1", "--nproc-per-node=2", "main.py"]) == own
    start = time.monotonic()
    assert first(own, ["--nnodes=2", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "main.py"], 0.5) == own
    assert time.monotonic() - start < 5


def test_the_flight_recorder_writes_into_the_run_folder(tmp_path: Path) -> None:
    variables: dict[str, str] = {"TORCH_FR_BUFFER_SIZE": "7"}
    record(tmp_path, variables)
    assert variables["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert (variables["TORCH_FR_BUFFER_SIZE"], variables["TORCH_NCCL_TRACE_BUFFER_SIZE"]) == ("7", "2000")
    assert variables["TORCH_FR_DUMP_TEMP_FILE"] == variables["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"]
    assert variables["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/nccl-trace-rank-"


def node(number: int, port: int, log: Path, *command: str, **variables: str) -> "subprocess.Popen[bytes]":
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=test"]
    options += [f"--rdzv-endpoint=127.0.0.1:{port}"]
    with (log / f"{number}.log").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "training.node", *options, *command], cwd=ROOT, env=environment() | variables,
            stdout=output, stderr=output,
        )  # fmt: skip


@pytest.mark.slow
def test_nodes_meet_by_the_names_that_the_cluster_gives_them(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text("import os; print('reached by', os.environ['MASTER_ADDR'])")
    port = free_port()
    names: list[dict[str, str]] = [{"SLURMD_NODENAME": "localhost"}, {"POD_IP": "localhost"}]
    nodes = [node(number, port, tmp_path, str(tmp_path / "rank.py"), **names[number]) for number in range(2)]
    assert [each.wait(60) for each in nodes] == [0, 0]
    for number in range(2):
        assert "reached by localhost" in (tmp_path / f"{number}.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_dies_ends_the_job_on_both_nodes_which_name_it(tiny_data: Path, tmp_path: Path, dies: int) -> None:
    gate: dict[str, Any] = {"imports": [GATE], "callbacks": [{"name": "gate", "step": 3}]}
    file = write_config(tmp_path, tiny_data, 2000, checkpoint={"interval": "1B"}, trainer={"hang_timeout": 60}, **gate)
    port, run = free_port(), tmp_path / "run"
    nodes = [
        node(number, port, tmp_path, str(ROOT / "main.py"), "train", str(file), SLURMD_NODENAME="localhost")
        for number in range(2)
    ]
    end = time.monotonic() + 180
    while not all((run / f"waiting-{number}").exists() for number in range(2)):
        assert [each.poll() for each in nodes] == [None, None], (tmp_path / "0.log").read_text()
        assert time.monotonic() < end
        time.sleep(0.05)
    victim = int((run / f"waiting-{dies}").read_text())
    assert any(rank(each.pid, dies).pid == victim for each in nodes if _has(each.pid, dies))
    open_gate(run)
    start = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    codes = [each.wait(90) for each in nodes]
    assert time.monotonic() - start < 60  # trainer.hang_timeout
    assert all(codes)
    for number in range(2):
        text = (tmp_path / f"{number}.log").read_text()
        lines = [line for line in text.splitlines() if line.startswith("error: rank ")]
        assert lines == [f"error: rank {dies} on {socket.gethostname()} was killed by SIGKILL; the job ends with it"], (
            text
        )


def _has(launcher: int, number: int) -> bool:
    try:
        return rank(launcher, number).is_running()
    except StopIteration:
        return False
