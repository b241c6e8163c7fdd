"""`launch ray` on a real Ray of this machine."""

from pathlib import Path
from typing import Any

import pytest

from commands.launch_ray import RayOptions, launch_ray
from flexbert_core.schema import ConfigError, RunError
from tests.helpers.ranks import Ranks
from tests.helpers.runs import command, run
from tests.helpers.tiny import check_same, write_config

pytest.importorskip("ray", reason="ray is in requirements-data.txt: install it")


@pytest.mark.slow
def test_a_run_on_ray_is_the_run(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path / "ray", tiny_data, 6)
    done = run(command("launch", "ray", str(file), "--gpus-per-node", "0"), timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{tmp_path}/ray/run: done on 1 nodes, logs in {tmp_path}/ray/run/ray"
    assert "steps" in (tmp_path / "ray/run/ray/node-0.log").read_text()
    ranks.train(1, str(write_config(tmp_path / "one", tiny_data, 6)))
    check_same(tmp_path / "ray", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.long
def test_a_node_that_fails_is_named_after_its_restarts(tiny_data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("import os\nif 'TORCHELASTIC_RUN_ID' in os.environ: os._exit(7)\n")
    file = write_config(tmp_path, tiny_data, 6, imports=[str(bad)])
    done = run(command("launch", "ray", str(file), "--gpus-per-node", "0", "--max-restarts", "1"), timeout=400)
    assert done.returncode == 1
    restart, line = done.stderr.strip().splitlines()
    assert restart == "launch ray: exit codes [7], restart 1 of 1"
    assert line.startswith("error: node 0: exit code 7: error: rank 0 on ")
    assert "ended with exit code 7; the job ends with it" in line


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"nodes": 3, "gpus_per_node": 1}, ConfigError, "batches of 8 rows cannot be divided among 3 ranks"),
        pytest.param(
            {"nodes": 1, "gpus_per_node": 8},
            RunError,
            "launch ray: the cluster has 0 GPUs, 1 nodes with 8 each were asked for: ask for less",
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_refused(
    tiny_data: Path, tmp_path: Path, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        launch_ray(write_config(tmp_path, tiny_data, 2), (), RayOptions(**options))
    assert not (tmp_path / "run").exists()
