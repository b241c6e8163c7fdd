"""Slurm jobs: stub programs stand for the cluster; the rendered script, its srun and the ranks below are real."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from commands.launch import SlurmOptions, launch_slurm
from flexbert.config import TOKEN_IDS
from flexbert_core.schema import RunError
from tests.helpers.in_process import invoke
from tests.helpers.ranks import Ranks
from tests.helpers.runs import GATE, ROOT, environment, open_gate, rank, run, wait_at_gate
from tests.helpers.tiny import write_config
from training.checkpoints.files import list_checkpoints, load_checkpoint
from training.signals import EXIT_PREEMPTED

pytest.importorskip("submitit", reason="submitit is in requirements.txt: install it")

# One node, this machine. A job runs in the foreground of sbatch. scontrol requeue is only noted: a test runs the script
# again, as Slurm would.
STUBS = {
    "sbatch": """
import os, subprocess, sys
from pathlib import Path
script = Path(sys.argv[-1])
options = dict(line[10:].split("=", 1) for line in script.read_text().splitlines() if line.startswith("#SBATCH --") and "=" in line)
if options.get("partition") == "nowhere":
    print("sbatch: error: invalid partition specified: nowhere", file=sys.stderr)
    print("sbatch: error: Batch job submission failed: Invalid partition name specified", file=sys.stderr)
    sys.exit(1)
variables = {"SLURM_JOB_ID": "7", "SLURM_NNODES": options["nodes"], "SLURM_JOB_NODELIST": "localhost"}
with open(options["output"].replace("%j", "7"), "a") as log:
    code = subprocess.run(["bash", str(script)], env={**os.environ, **variables}, stdout=log, stderr=log).returncode
(Path(os.environ["FAKE_SLURM"]) / "codes").open("a").write(f"{code}\\n")
print("7;cluster")
""",
    "srun": """
import os, subprocess, sys
from pathlib import Path
arguments = sys.argv[1:]
while arguments[0].startswith("--"):
    arguments.pop(0)
(Path(os.environ["FAKE_SLURM"]) / "srun").open("a").write(" ".join(arguments) + "\\n")
if "FAKE_CODE" in os.environ:
    if "FAKE_CANCEL" in os.environ:  # scancel: all steps and the script
        os.kill(os.getppid(), 15)
    sys.exit(int(os.environ["FAKE_CODE"]))
sys.exit(subprocess.run(arguments).returncode)
""",
    "scontrol": """
import os, sys
from pathlib import Path
if sys.argv[1] == "show":
    print(sys.argv[3])
else:
    (Path(os.environ["FAKE_SLURM"]) / "scontrol").open("a").write(" ".join(sys.argv[1:]) + "\\n")
""",
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's programs first on PATH; gives the folder of what they note."""
    programs, notes = tmp_path / "programs", tmp_path / "notes"
    for folder in (programs, notes):
        folder.mkdir()
    for name, code in STUBS.items():
        (programs / name).write_text(f"#!{sys.executable}\n{code}")
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(notes))
    return notes


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the ranks of a job."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def launch(file: Path, *overrides: str, print_only: bool = False, **options: Any) -> str:
    defaults = {"nodes": 1, "gpus_per_node": 2, "time": "1:00:00"}
    return launch_slurm(file, overrides, SlurmOptions(**(defaults | options)), print_only)


def notes(cluster: Path, name: str) -> list[str]:
    return (cluster / name).read_text().splitlines() if (cluster / name).exists() else []


def test_the_job_goes_on_after_85_and_only_then(
    cluster: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_config(tmp_path, tiny_data, 2)
    log = tmp_path / "run" / "slurm" / "7.log"
    for code in (0, 1, 2, 143):
        monkeypatch.setenv("FAKE_CODE", str(code))
        said = launch(file, "seed=3")
        assert notes(cluster, "codes")[-1] == str(code)
        assert not notes(cluster, "scontrol")
    assert said == f"job 7 submitted: {tmp_path}/run/slurm/job.sbatch, log in {log}"
    monkeypatch.setenv("FAKE_CODE", str(EXIT_PREEMPTED))
    with monkeypatch.context() as patch:
        patch.setenv("FAKE_CANCEL", "yes")
        launch(file)
    assert not notes(cluster, "scontrol")  # cancelled while it saved: it must not rise again
    launch(file)
    assert notes(cluster, "codes")[-2:] == [str(EXIT_PREEMPTED)] * 2
    assert notes(cluster, "scontrol") == ["requeue 7"]
    assert log.read_text().count("requeueing job 7: the run saved and stopped") == 1
    plain = notes(cluster, "srun")[0]
    assert plain.endswith(f"main.py train {file} seed=3")
    assert "--nnodes=1 --nproc-per-node=2 " in plain


def test_where_no_script_can_be_written_it_is_said_in_a_line(cluster: Path, tiny_data: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path, tiny_data, 2)
    (tmp_path / "file").write_text("no folder")
    arguments = ["--nodes", "1", "--gpus-per-node", "1", "--time", "1:00:00", f"runs={tmp_path}/file"]
    said = invoke("launch", "slurm", str(file), *arguments, code=1)
    assert said.startswith(f"error: {tmp_path}/file/run/slurm: Not a directory: choose a place where you may write")
    assert said.count("\n") == 1


def test_a_crash_is_requeued_so_often(
    cluster: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As --max-restarts says, for exit codes that another start may mend; a cancelled job stays down."""
    file = write_config(tmp_path, tiny_data, 2)
    for code in (0, 2):
        monkeypatch.setenv("FAKE_CODE", str(code))
        launch(file, max_restarts=2)
    with monkeypatch.context() as patch:
        patch.setenv("FAKE_CANCEL", "yes")
        monkeypatch.setenv("FAKE_CODE", "143")
        launch(file, max_restarts=2)
    assert notes(cluster, "scontrol") == []
    for code, requeues in ((1, 1), (137, 2), (1, 2), (1, 2)):
        monkeypatch.setenv("FAKE_CODE", str(code))
        launch(file, max_restarts=2)
        assert notes(cluster, "codes")[-1] == str(code)
        assert notes(cluster, "scontrol") == ["requeue 7"] * requeues
    log = (tmp_path / "run" / "slurm" / "7.log").read_text()
    assert "requeueing job 7: exit code 137, restart 2 of 2 (--max-restarts)" in log
    monkeypatch.setenv("FAKE_CODE", str(EXIT_PREEMPTED))
    launch(file, max_restarts=2)
    assert notes(cluster, "scontrol") == ["requeue 7"] * 3


@pytest.mark.slow
@pytest.mark.long
def test_a_signal_before_the_time_limit_costs_nothing(cluster: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Two real ranks under the script: SIGUSR2 for the job's step, requeue, and the run ends where it would have."""
    gate: dict[str, Any] = {"imports": [GATE], "callbacks": [{"name": "gate", "step": 3}]}
    file = write_config(tmp_path, tiny_data, 30, checkpoint={"interval": "1M"}, **gate)

    def signal_the_step() -> None:
        wait_at_gate(tmp_path / "run", 2, os.getpid())
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if "training.node" in line and str(file) in line and "srun" not in " ".join(line):
                process.send_signal(signal.SIGUSR2)
        time.sleep(0.5)  # until it has come to the ranks, which are held; if not, 27 steps are left
        open_gate(tmp_path / "run")

    thread = threading.Thread(target=signal_the_step)
    thread.start()
    launch(file)
    thread.join()
    log = (tmp_path / "run" / "slurm" / "7.log").read_text()
    assert notes(cluster, "codes") == [str(EXIT_PREEMPTED)], log
    assert notes(cluster, "scontrol") == ["requeue 7"]
    assert not (tmp_path / "run" / "summary.json").exists()
    launch(file)
    log = (tmp_path / "run" / "slurm" / "7.log").read_text()
    assert notes(cluster, "codes")[1:] == ["0"], log
    assert notes(cluster, "scontrol") == ["requeue 7"]
    assert "resuming after step" in " ".join(log.split())
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_print_writes_nothing(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path, tiny_data, 2)
    options = (
        "--nodes 1 --gpus-per-node 2 --time 1:00:00 --partition gpu --account nlp --cpus-per-node 32 --sbatch exclusive"
    )
    more = ["--sbatch", "qos=high", "--setup", "module load cuda"]
    codes, text = ranks.run(1, "launch", "slurm", str(file), "--print", *options.split(), *more)
    assert codes == [0], text
    lines = text.splitlines()
    wanted = (
        "nodes=1 gpus-per-node=2 ntasks-per-node=1 cpus-per-task=32 partition=gpu account=nlp time=1:00:00 exclusive"
    )
    for option in [*wanted.split(), "qos=high", "requeue", "signal=USR2@300", "open-mode=append"]:
        assert f"#SBATCH --{option}" in lines
    assert "module load cuda" in lines
    assert "@" not in text.replace("USR2@300", "").replace("@NAMES@", "")
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--gpus-per-node", "3"],
            "phases: batches of 8 rows cannot be divided among 3 ranks (1 nodes x 3 GPUs): change one of them",
        ),
        (["--time", "1 day"], "--time: '1 day': expected minutes, HH:MM:SS or D-HH:MM:SS"),
        (
            ["--time", "0-0:9"],
            "--time: 0-0:9: the run is asked to stop 300 s before the limit: give more than 10 minutes",
        ),
        (["--sbatch", "nodes=5"], "--sbatch: nodes: use --nodes"),
        (["--sbatch", "time=1:00"], "--sbatch: time: use --time"),
        (["--sbatch", "part=gpu"], "--sbatch: part: use --partition"),
        (["--sbatch", "account=nlp"], "--sbatch: account: use --account"),
        (["--sbatch", "gpus-per-node=4"], "--sbatch: gpus-per-node: use --gpus-per-node"),
        (["--sbatch", "gpus=4"], "--sbatch: gpus: use --gpus-per-node"),
        (["--sbatch", "cpus-per-task=4"], "--sbatch: cpus-per-task: use --cpus-per-node"),
        *(
            (["--sbatch", f"{key}=1"], f"--sbatch: {key}: leave it out: the job script decides it")
            for key in (
                "signal",
                "array",
                "arr",
                "ntasks",
                "ntasks-per-gpu",
                "error",
                "output",
                "open-mode",
                "job-name",
                "requeue",
            )
        ),
        (["--sbatch", "-N=5"], "--sbatch: -N: is no long option of sbatch: give NAME=VALUE or NAME, such as qos=high"),
        (
            ["from=nowhere/none"],
            "from: nowhere/none: neither a checkpoint, a run nor a Hugging Face folder: give "
            "runs/NAME/checkpoints/tokens-N, a folder, or hf:ORG/NAME",
        ),
        (
            ["data.streams.full.path=nowhere/none"],
            "data.streams.full.path: nowhere/none/train: no such stream folder: run `python main.py prepare` first, or correct the path",
        ),
        (["seed=many"], "train.yaml: seed: should be a valid integer, got 'many'"),
        ([], "launch slurm: no sbatch on PATH: run this where jobs can be submitted, or look with --print"),
    ],
)
def test_bad_input_exits_2(ranks: Ranks, tiny_data: Path, tmp_path: Path, options: list[str], message: str) -> None:
    file = write_config(tmp_path, tiny_data, 2)
    codes, text = ranks.run(
        1,
        "launch",
        "slurm",
        str(file),
        *(options if "--gpus-per-node" in options else ["--gpus-per-node", "2", *options]),
    )
    assert codes == [2], text
    (line,) = text.strip().splitlines()
    assert line.startswith("error: ")
    assert line.endswith(message)
    assert not (tmp_path / "run").exists()


def test_what_a_run_grows_from_must_be_there_unless_it_goes_on(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    model = {
        "preset": "modernbert-base",
        **dict.fromkeys(TOKEN_IDS),
        "init": {"name": "grow", "from": str(tmp_path / "none")},
    }
    file = write_config(tmp_path, tiny_data, 2, model=model)
    arguments = ["launch", "slurm", str(file), "--gpus-per-node", "2", "--print"]
    codes, text = ranks.run(1, *arguments)
    assert codes == [2]
    (line,) = text.strip().splitlines()
    assert line.startswith(f"error: init.from: {tmp_path}/none: ")
    (tmp_path / "run" / "checkpoints" / "tokens-256").mkdir(parents=True)
    codes, text = ranks.run(1, *arguments)
    assert codes == [0], text
    (tmp_path / "run" / "checkpoints" / "tokens-256").rmdir()
    (tmp_path / "run" / "first_checkpoint.json").write_text("{}")
    codes, text = ranks.run(1, *arguments)
    assert codes == [2]
    assert "its checkpoints are gone" in text


def test_sbatch_refuses(cluster: Path, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"^sbatch refused .*job\.sbatch \(exit code 1\): .*Invalid partition name specified$"
    ):
        launch(write_config(tmp_path, tiny_data, 2), partition="nowhere")


def test_torchrun_exits_with_the_code_of_its_rank(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text("import os, sys; sys.exit(85 if os.environ['RANK'] == '1' else 0)")
    options = ["--standalone", "--nproc-per-node", "2", str(tmp_path / "rank.py")]
    assert run([sys.executable, "-m", "training.node", *options]).returncode == 85


# As the job script runs it, but torch kills after 2 s what it has asked to end.
SHORT = """
import sys
from torch.distributed.elastic.multiprocessing.api import PContext
PContext.close.__defaults__ = (None, 2)
from training.node import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_stop_that_takes_longer_than_torch_waits_saves(tiny_data: Path, tmp_path: Path) -> None:
    """SIGTERM while rank 0 does not get on: it is waited for, and it saves."""
    file = write_config(tmp_path, tiny_data, 2000, checkpoint={"interval": "1B"})
    options = ["--standalone", "--nproc-per-node", "2", str(ROOT / "main.py"), "train", str(file)]
    node = start_node([sys.executable, "-c", SHORT, *options])
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert node.poll() is None, node.communicate()[0]
        time.sleep(0.02)
    first = rank(node.pid, 0)
    first.suspend()
    node.send_signal(signal.SIGTERM)
    time.sleep(6)
    assert node.poll() is None
    first.resume()
    output = node.communicate(timeout=120)[0]
    assert node.returncode == EXIT_PREEMPTED, output
    (saved,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert load_checkpoint(saved).state["step"] == steps[-1]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGTERM, 85, marks=pytest.mark.slow),
        (signal.SIGUSR1, 85),
        pytest.param(signal.SIGINT, 85, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
    ],
)
def test_the_code_is_what_the_ranks_end_with(tmp_path: Path, number: signal.Signals, code: int) -> None:
    (tmp_path / "rank.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))\n"
        f"pathlib.Path({str(tmp_path)!r}, 'ready' + os.environ['RANK']).touch()\n"
        "time.sleep(100)\n"
    )
    options = ["--standalone", "--nproc-per-node", "2", str(tmp_path / "rank.py")]
    node = start_node([sys.executable, "-m", "training.node", *options])
    while len(list(tmp_path.glob("ready*"))) < 2:
        assert node.poll() is None, node.communicate()[0]
        time.sleep(0.05)
    node.send_signal(number)
    output = node.communicate(timeout=60)[0]
    assert node.returncode == code, output


def test_a_signal_before_the_nodes_have_met(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "none.py",
    ]
    node = start_node([sys.executable, "-m", "training.node", *options])
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        assert node.poll() is None, node.communicate()[0]
        time.sleep(0.1)
    node.send_signal(signal.SIGTERM)
    output = node.communicate(timeout=60)[0]
    assert node.returncode == EXIT_PREEMPTED, output


def start_node(arguments: list[str]) -> "subprocess.Popen[str]":
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(arguments, cwd=ROOT, env=environment(), **pipes)
