"""Collectives: one module makes them, on the device that the process group is for."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT, environment

# Of torch.distributed and of composer.utils.dist.
COLLECTIVES = ("all_gather", "all_reduce", "all_to_all", "barrier", "broadcast", "gather", "reduce", "scatter")
COLLECTIVES += ("recv", "send", "monitored_barrier")
ROOMS = ("main.py", "commands", "sweeps", "evals", "training", "callbacks", "recipe", "data", "flexbert", "jobs")


def collectives_of(text: str) -> list[int]:
    """Lines that call one on a module named `dist`, or take one from it."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and node.attr.startswith(COLLECTIVES):
            owner = ast.unparse(node.value)
            found += [node.lineno] * (owner.rpartition(".")[2] in ("dist", "distributed"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").endswith(("distributed", "utils.dist")):
            found += [node.lineno for name in node.names if name.name.startswith(COLLECTIVES)]
    return found


def test_no_other_module_calls_a_collective() -> None:
    assert collectives_of("from torch import distributed as dist\nx = dist.all_reduce(t)\n") == [2]
    assert collectives_of("import torch\ntorch.distributed.barrier()\nfrom composer.utils.dist import broadcast\n") == [
        3,
        2,
    ]
    assert len(collectives_of((ROOT / "ranks.py").read_text())) >= 5
    files = [
        file for room in ROOMS for file in ([ROOT / room] if room.endswith(".py") else (ROOT / room).rglob("*.py"))
    ]
    assert len(files) > 100
    assert {str(file.relative_to(ROOT)): lines for file in files if (lines := collectives_of(file.read_text()))} == {}


# A group of two that takes tensors on CUDA only, as NCCL's does: on a CPU what is sent there fails for want of a driver,
# and what is not fails as it does under NCCL.
SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
import ranks
rank = 0 if os.fork() else 1
dist.init_process_group("cuda:gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
calls = {
    "over_ranks": lambda: ranks.over_ranks(torch.ones(3)),
    "on_any_rank": lambda: ranks.on_any_rank(True),
    "on_any_rank, a tensor": lambda: ranks.on_any_rank(torch.ones(())),
    "from_rank_0": lambda: ranks.from_rank_0({"step": 1}),
    "of_all_ranks": lambda: ranks.of_all_ranks({"step": 1}),
    "add_up": lambda: ranks.add_up(torch.ones(3), DeviceMesh.from_group(dist.group.WORLD, "cpu")),  # where it lies
}
said = {}
for name, call in calls.items():
    try:
        said[name] = str(call())
    except RuntimeError as error:
        said[name] = str(error).splitlines()[0]
if rank == 0:
    print(json.dumps(said))
sys.stdout.flush()
os._exit(0)
"""


def test_every_collective_is_sent_to_the_device_of_the_group(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "store")], cwd=ROOT, env=environment() | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    said = json.loads(done.stdout.splitlines()[-1])
    assert said.pop("add_up") == "No backend type associated with device type cpu"
    assert len(said) == 5
    assert all("NVIDIA driver" in text or "CUDA" in text for text in said.values()), said


# Two ranks over gloo. Rank 0 works for longer than a collective would wait, tells that it gets on, and ends later still.
WAITING = """
import json, os, sys, time
from datetime import timedelta
import torch.distributed as dist
import ranks
rank = 0 if os.fork() else 1
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2, timeout=timedelta(seconds=1))
moves, start = [], time.monotonic()
def work(got_on):
    assert rank == 0
    for _ in range(16):
        time.sleep(0.15)
        got_on()
ranks.wait_for_rank_0(work, lambda: moves.append(1))
waited = time.monotonic() - start
same = ranks.from_rank_0("rank 0's") == "rank 0's"
try:
    with ranks.until_rank_0_ends(lambda: False):
        if rank == 0:
            time.sleep(1.2)
            if sys.argv[2] == "fails":
                raise ValueError
except ValueError:
    pass
open(f"{sys.argv[1]}-{rank}", "w").write(json.dumps([waited, len(moves), same, time.monotonic() - start]))
if rank == 0:
    os.wait()
"""


@pytest.mark.parametrize("end", ["ends", pytest.param("fails", marks=pytest.mark.slow)])
def test_others_wait_for_rank_0_as_long_as_it_takes(tmp_path: Path, end: str) -> None:
    """With its time-outs, no collective would; and whatever became of rank 0, they leave with it."""
    done = subprocess.run(
        [sys.executable, "-c", WAITING, str(tmp_path / "store"), end], cwd=ROOT, env=environment(), timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0
    found = [json.loads((tmp_path / f"store-{rank}").read_text()) for rank in range(2)]
    assert found[0][1] == 16
    assert 1 <= found[1][1] <= 3
    for waited, _, same, left in found:
        assert waited >= 2
        assert same
        assert left >= waited + 1.1
