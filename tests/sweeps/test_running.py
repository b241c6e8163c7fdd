"""Real sweeps of tiny runs in real processes: killed, grown, broken."""

import contextlib
import itertools
import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM

from benchmarks.tiny_sweep import write_tiny_sweep
from flexbert_core.schema import ConfigError
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from sweeps.arms import expand
from sweeps.file import load_sweep_file
from sweeps.folder import cells_of, read_sweep
from sweeps.folder import write_sweep as record
from sweeps.statistics import verdicts
from tests.helpers.runs import ROOT, command, environment, run, train_alone
from tests.helpers.tiny import ROW, ROWS, write_config, write_data
from training.checkpoints.files import list_checkpoints, tokens_of
from training.document_losses import HeldOutDocuments
from training.trainer import train

STEPS = 6
ARMS = {"wide": {"model.intermediate_size": 32}}
pytestmark = pytest.mark.slow


def write_sweep(folder: Path, steps: int = STEPS, **changes: Any) -> Path:
    data = folder / "data"
    if not data.exists():
        write_data(data)
    base = write_config(folder / "base", data, steps, "full", "sparse")
    node = {"base": str(base), "folder": str(folder / "sweep"), "seeds": [0], "list": ARMS}
    node["executor"] = {"name": "local", "at_once": 2, "cores_per_job": 1, "gpus_per_job": 0}
    file = folder / "tiny.yaml"
    file.write_text(json.dumps({**node, **changes}))
    return file


def weights(folder: Path, steps: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"tokens-{steps * ROWS * ROW}" / "model.safetensors")


def test_killed_again_and_again_it_trains_no_step_twice_beyond_its_last_checkpoint(tmp_path: Path) -> None:
    """At a random moment after a run has saved a further step; every other time its runs are killed, too, which then save
    nothing. Each run says in its log where it goes on: at the newest checkpoint that the kill has left. In the end runs
    are, to the bit, what they are by themselves."""
    steps = 120
    file = write_sweep(tmp_path, steps)
    folder, names = tmp_path / "sweep", ("baseline-s0", "wide-s0")
    rng = np.random.default_rng(3)
    resumed = kills = 0
    while True:
        saved = {name: newest(folder / "runs" / name) for name in names}
        sizes = {name: len(log_of(folder, name)) for name in names}
        done = [name for name in names if (folder / "runs" / name / "summary.json").exists()]

        def begun(name: str, sizes: dict[str, int] = sizes) -> list[int]:
            said = log_of(folder, name)[sizes[name] :]
            return [int(step or 0) for step in re.findall(r"(?:resuming after step (\d+)|: starting), ", said)]

        process = subprocess.Popen(
            command("sweep", str(file)), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
        )
        if kills < 2:
            end = time.monotonic() + 200
            while process.poll() is None and all(newest(folder / "runs" / name) == saved[name] for name in names):
                assert time.monotonic() < end
                time.sleep(0.02)
            time.sleep(float(rng.uniform(0, 1)))
            jobs = psutil.Process(process.pid).children() if process.poll() is None and kills % 2 else []
            process.kill()
            for job in jobs:
                with contextlib.suppress(psutil.NoSuchProcess):
                    job.kill()
            wait_for_jobs(folder)  # which otherwise end with the sweep, and save
        process.wait(400)
        for name in names:
            assert begun(name) in ([], [saved[name]])
            assert not (begun(name) and name in done)
            resumed += begun(name) not in ([], [0])
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0
            break
        kills += 1
    assert kills >= 1  # a quick machine may be done before the second
    assert resumed >= kills
    result = read_sweep(folder)
    assert {cell: each.state for cell, each in result.runs.items()} == {
        ("baseline", 0): "finished",
        ("wide", 0): "finished",
    }
    for name in names:
        trained = [line["step"] for line in read_lines(folder / "runs" / name / "metrics.jsonl") if "loss" in line]
        assert trained == list(range(1, steps + 1))
        train_alone(folder / f"cells/{name}.yaml", f"runs={tmp_path}/alone")
        ours, theirs = (weights(each / name, steps) for each in (folder / "runs", tmp_path / "alone"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        first, second = (sums_of(each / name) for each in (folder / "runs", tmp_path / "alone"))
        assert np.array_equal(first, second)


def sums_of(run: Path) -> np.ndarray:
    with np.load(run / "held_out_documents.npz") as arrays:
        return arrays["sums"]


def newest(run: Path) -> int:
    """The step of its newest checkpoint, 0 without one."""
    found = list_checkpoints(run / "checkpoints")
    return tokens_of(found[-1]) // (ROWS * ROW) if found else 0


def log_of(folder: Path, name: str) -> str:
    file = folder / "logs" / f"{name}.log"
    return file.read_text() if file.exists() else ""


@pytest.mark.long
def test_runs_as_tasks_of_ray_are_those_that_are_trained_here(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed: requirements-data.txt")
    file = write_sweep(tmp_path, executor={"name": "ray"})
    done = run(command("sweep", str(file)), timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done  ") == 2
    for name in ("baseline-s0", "wide-s0"):
        train_alone(tmp_path / f"sweep/cells/{name}.yaml", f"runs={tmp_path}/here")
        ours, theirs = (weights(each / name) for each in (tmp_path / "sweep/runs", tmp_path / "here"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert all(read_sweep(tmp_path / "sweep").paired.values())
    again = run(command("sweep", str(file)))
    assert (again.returncode, again.stdout.count("started")) == (0, 0)


def test_a_better_arm_is_called_better_and_arms_that_are_the_baseline_are_not(tmp_path: Path) -> None:
    """Real runs: ten times a learning rate that is far too low; another order of sums; another order of documents."""
    file = write_tiny_sweep(tmp_path, seeds=3, steps=40)
    train_here(file)
    planted, rounded, reordered = verdicts(read_sweep(tmp_path / "sweep"))
    assert (planted.arm, planted.verdict, planted.paired) == ("planted", "better", True)
    assert planted.high is not None
    assert planted.high < -0.1
    assert (rounded.verdict, rounded.paired) == ("no difference shown", True)
    assert (reordered.verdict, reordered.paired) == ("no difference shown", False)


def wait_for_jobs(folder: Path) -> None:
    end = time.monotonic() + 60
    while (
        any(each.state == "running" for each in read_sweep(folder).runs.values())
        if (folder / "sweep.json").exists()
        else False
    ):
        assert time.monotonic() < end
        time.sleep(0.2)


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_it_grows_a_broken_arm_stops_no_other_and_begun_runs_stay_what_they_are(tmp_path: Path) -> None:
    broken = {"data.streams": {"full": {"path": str(tmp_path / "nowhere")}}}
    file = write_sweep(tmp_path, list={**ARMS, "broken": broken})
    first = run(command("sweep", str(file)))
    assert first.returncode == 1
    assert "warning: broken-s0: exit code 2" in first.stdout
    assert "1 of 3 runs are not finished: broken-s0" in first.stdout
    written = {
        name: (tmp_path / "sweep/runs" / name / "summary.json").stat().st_mtime_ns
        for name in ("baseline-s0", "wide-s0")
    }

    file = write_sweep(tmp_path, seeds=[0, 1], list={**ARMS, "masks": {"masking.rate": 0.2}})
    second = run(command("sweep", str(file)))
    assert second.returncode == 0, second.stdout + second.stderr
    assert "2 of 6 runs finished" in second.stdout
    for name, stamp in written.items():
        assert (tmp_path / "sweep/runs" / name / "summary.json").stat().st_mtime_ns == stamp
    result = read_sweep(tmp_path / "sweep")
    assert {cell for cell, paired in result.paired.items() if not paired} == {("masks", 0), ("masks", 1)}
    assert "masking.rate" in next(arm for arm in result.arms if arm.name == "masks").notes[0]
    counts = [each.documents.counts for each in result.runs.values() if each.documents is not None]
    assert len(counts) == 6
    assert all(np.array_equal(each, counts[0]) for each in counts)
    losses = [each.documents.loss for each in result.runs.values() if each.documents is not None]
    assert len(set(losses)) == 6
    shown = json.loads(run(command("sweep", "status", str(file), "--json")).stdout)
    assert [each["state"] for each in shown["runs"]] == ["finished"] * 6
    check_losses(tmp_path, result.runs["wide", 1])

    changed = write_sweep(tmp_path, list={"wide": {"model.intermediate_size": 40}})
    third = run(command("sweep", str(changed)))
    assert third.returncode == 2
    assert "wide, seed 0" in third.stderr
    assert "model.intermediate_size was 32, now 40" in third.stderr
    assert len(third.stderr.splitlines()) == 1


def test_decay_arms_branch_from_the_stable_run_of_their_seed(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    stable = {"base": str(tmp_path / "base/train.yaml"), "baseline": "stable", "list": {"stable": {}}, "seeds": [0, 1]}
    first = tmp_path / "stable.yaml"
    first.write_text(json.dumps({**stable, "folder": str(tmp_path / "stable")}))
    train_here(first)

    decays = {"steep": {"phases.0.schedule": "one_minus_sqrt"}}
    origin = str(tmp_path / "stable/runs/stable-s{seed}")
    train_here(write_sweep(tmp_path, seeds=[0, 1], list=decays, branch_from=origin))
    result = read_sweep(tmp_path / "sweep")
    assert {each.state for each in result.runs.values()} == {"finished"}
    for (_, seed), each in result.runs.items():
        begun = json.loads((each.folder / "origin.json").read_text())
        assert f"stable-s{seed}" in begun["from"]
        assert begun["tokens"] == STEPS * ROWS * ROW
    assert all(result.paired.values())


def train_here(file: Path) -> None:
    """All runs of a sweep, in this process."""
    design = expand(file, load_sweep_file(file))
    cells = cells_of(design)
    record(design, cells)
    for cell in cells:
        train(cell.config, Console(quiet=True))


def check_losses(folder: Path, result: Any) -> None:
    """By document, as transformers' model of the export has them on the same masks."""
    config = load_run_config(folder / "sweep/cells/wide-s1.yaml")
    plan = PhasePlan(config)
    entry = next(each for each in config.evaluations if each.name == "held_out_documents")
    measure = HeldOutDocuments(entry, run=config, plan=plan, streams=[], folder=folder / "none")
    export = folder / "sweep/runs/wide-s1/exports" / f"tokens-{plan.total_tokens}"
    model = AutoModelForMaskedLM.from_pretrained(export).eval()
    found = {}
    for name, stream in measure.streams.items():
        for number, make in enumerate(measure.documents_of(stream)):
            batch = make()
            total, bounds = 0.0, batch["cu_seqlens"].tolist()
            for start, stop in itertools.pairwise(bounds):
                with torch.no_grad():
                    logits = model(input_ids=batch["input_ids"][None, start:stop]).logits[0]
                total += float(cross_entropy(logits, batch["labels"][start:stop], ignore_index=-100, reduction="sum"))
            found[f"{name}/{number}"] = total
    for name, total in zip(result.documents.documents, result.documents.sums, strict=True):
        assert total == pytest.approx(found[name], rel=1e-4)


def test_a_sweep_that_is_none_and_two_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no sweep"):
        read_sweep(tmp_path)
    file = write_sweep(tmp_path)
    design = expand(file, load_sweep_file(file))
    assert [(cell.arm, cell.seed) for cell in cells_of(design)] == [("baseline", 0), ("wide", 0)]
    shutil.rmtree(tmp_path / "data")
    dry = run(command("sweep", str(file), "--dry-run"))
    assert dry.returncode == 0, dry.stderr
    assert not (tmp_path / "sweep").exists()
