"""64 ranks of which one is here: every optimizer that works on shards, clipping and a snapshot where most parameters
leave a rank no part."""

import json
import subprocess
import sys

import pytest

from recipe.slots import OPTIMIZERS
from tests.helpers.runs import ROOT, environment

# torch's own group without processes: what others would send is not there, shapes and counts are.
SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from flexbert import build
from recipe.slots import OPTIMIZERS
from tests.helpers.models import batch_of, tiny
from training.checkpoints.files import take_snapshot
import ranks
import training.optim.optimizers

rank, names, said = int(sys.argv[1]), sys.argv[2:], {}
dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=64)
for name in names:
    model = build(tiny())
    shapes = {key: list(each.shape) for key, each in model.named_parameters()}
    mesh = init_device_mesh("cpu", (64,))
    for block in model.encoder.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ranks.average_by_sums(model)
    optimizer = OPTIMIZERS.build(OPTIMIZERS.parse(name), model=model, lr=0.01)
    empty = sum(each.to_local().numel() == 0 for each in model.parameters())
    for _ in range(2):
        for each in model.parameters():
            each.grad = torch.ones_like(each)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    snapshot = take_snapshot(model, optimizer, wanted=rank == 0)
    said[name] = {
        "empty": empty,
        "parameters": len(shapes),
        "finite": all(bool(each.to_local().isfinite().all()) for each in model.parameters()),
        "norm": float(norm.full_tensor()),
        "whole": {key: list(each.shape) for key, each in snapshot.model.items()} == shapes if rank == 0 else not snapshot.model,
        "states": len(snapshot.optimizer),
    }
print(json.dumps(said))
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 63])
def test_a_rank_may_hold_no_part_of_a_parameter(rank: int) -> None:
    names = sorted(name for name, entry in OPTIMIZERS.entries.items() if getattr(entry, "works_on_shards", False))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(rank), *names], cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert list(said) == names
    assert {"adamw", "stableadamw", "lion", "muon"} <= said.keys()
    for found in said.values():
        assert found["finite"]
        assert found["whole"]
        assert found["norm"] > 0 if rank == 0 else found["norm"] >= 0
        assert (found["states"] > 0) is (rank == 0)
        # Rows of 97, 144, 80 or 48: of 48 the last 16 ranks have none.
        assert found["empty"] > (found["parameters"] // 2 if rank == 63 else -1)
