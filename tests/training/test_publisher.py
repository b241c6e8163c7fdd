"""A run that publishes: its exports, the process beside it, and that training is neither stopped nor slowed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.helpers.hub import hub_environment, run_hub
from tests.helpers.in_process import PER_STEP, go, said
from tests.helpers.publishing import EXPORTS, write_run
from tests.helpers.ranks import Ranks
from tests.helpers.runs import ROOT
from tests.helpers.tiny import write_config


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_exports_what_it_keeps(tiny_data: Path, tmp_path: Path) -> None:
    """And not the checkpoints that pass; with weights of its own each, those of step 0 as they were drawn."""
    run = go(write_run(tmp_path, tiny_data))
    assert names(run / "exports") == sorted(EXPORTS)
    weights = [load_file(run / "exports" / name / "model.safetensors") for name in EXPORTS]
    name = "model.embeddings.tok_embeddings.weight"
    assert len({tensors[name].sum().item() for tensors in weights}) == len(EXPORTS)
    assert "Trained on 0 of" in (run / "exports/tokens-0/README.md").read_text()
    assert not (run / "publish.log").exists()


@pytest.mark.slow
def test_resuming_neither_skips_nor_repeats_an_export(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    """Killed in the step before, at and behind each export. Both runs are trained by processes of as many threads: sums
    of another number of threads may differ in their last bit."""
    ranks.train(1, str(write_run(tmp_path / "straight", tiny_data)))
    straight = tmp_path / "straight" / "run"
    killer = {"imports": [str(ROOT / "tests/helpers/killer.py")]}
    killer["callbacks"] = [{"name": "killer", "steps": [1, 2, 3], "event": "batch_end"}]  # pyright: ignore
    file = write_run(tmp_path / "killed", tiny_data, **killer)
    run, times = tmp_path / "killed" / "run", dict[str, int]()
    for _ in range(3):
        codes, text = ranks.run(1, "train", str(file))
        assert codes == [-signal.SIGKILL], text
        for path in (run / "exports").glob("tokens-*"):
            changed = (path / "model.safetensors").stat().st_mtime_ns
            assert times.setdefault(path.name, changed) == changed
    ranks.train(1, str(file))
    assert names(run / "exports") == sorted(EXPORTS)
    for name in EXPORTS:
        for part in ("model.safetensors", "README.md"):
            assert (run / "exports" / name / part).read_bytes() == (straight / "exports" / name / part).read_bytes()
        if name in times:
            assert (run / "exports" / name / "model.safetensors").stat().st_mtime_ns == times[name]


@pytest.mark.slow
def test_a_finished_run_is_published(tiny_data: Path, tmp_path: Path) -> None:
    published = tmp_path / "published"
    file = write_run(tmp_path, tiny_data, publish={"folder": str(published)})
    run = go(file)
    assert names(published) == sorted([*EXPORTS, "main"])
    assert (published / "main").readlink() == Path(EXPORTS[3])
    assert "5 revisions pushed" in (run / "publish.log").read_text()
    shutil.rmtree(published / EXPORTS[1])
    assert "this run is finished" in said(file)
    assert names(published) == sorted([*EXPORTS, "main"])


@pytest.mark.slow
def test_a_push_that_fails_is_a_warning(tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "taken").write_text("a file")
    file = write_run(tmp_path, tiny_data, publish={"folder": str(tmp_path / "taken")})
    run = go(file)
    lines = [each.getMessage() for each in caplog.records if "NOT ALL IS PUBLISHED" in each.getMessage()]
    assert lines
    assert str(tmp_path / "taken") in lines[-1]
    assert f"main.py publish {run}" in lines[-1]
    assert json.loads((run / "summary.json").read_text())["steps"] == 3


@pytest.mark.slow
def test_training_does_not_wait_for_a_hub_that_does_not_answer(tiny_data: Path, tmp_path: Path) -> None:
    """The hub takes 5 s for every call: the steps between the exports are done long before. Killed, the training leaves
    a push that ends by itself, and no step was waited for."""
    with run_hub(tmp_path / "hub", token="secret") as hub:
        hub.delay = 5.0
        variables = {**os.environ, **hub_environment(hub, tmp_path / "home", token="secret"), "OMP_NUM_THREADS": "1"}
        file = write_config(
            tmp_path, tiny_data, 100_000, publish={"repo": "org/slow"}, checkpoint={"interval": 100 * PER_STEP}
        )
        process = subprocess.Popen(
            [sys.executable, "main.py", "train", str(file)], cwd=ROOT, env=variables, stdout=subprocess.DEVNULL
        )
        metrics = tmp_path / "run" / "metrics.jsonl"
        end = time.monotonic() + 120
        while not hub.calls["refs"]:
            assert time.monotonic() < end
            time.sleep(0.05)
        before = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        time.sleep(3)
        assert hub.calls["commit"] == 0  # it is still asking
        assert len(metrics.read_text().splitlines()) > before + 20
        (push,) = [child for child in psutil.Process(process.pid).children() if "publish" in child.cmdline()]
        process.kill()
        process.wait()
        hub.delay = 0.0
        push.wait(60)
        assert set(hub.branches("org/slow")) == {"main", "tokens-0"}
