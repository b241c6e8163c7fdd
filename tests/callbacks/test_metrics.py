"""What a run shows of itself, against plain torch on the same batches: metrics on every logger, `status`, `report`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from commands.inspect_step import inspect_step
from commands.status import read_status
from data.feed.loader import build_loader
from data.keyed import torch_seed
from flexbert import build, register
from flexbert.accounting import batch_flops
from flexbert.losses import TokenScores
from flexbert_core.durable import holder
from flexbert_core.schema import Component
from main import app
from recipe.config import RunConfig, load_run_config
from recipe.phases import PhasePlan
from recipe.slots import OPTIMIZERS
from tests.helpers.runs import (
    GATE,
    command,
    environment,
    metrics,
    open_gate,
    prepare_dataset,
    run,
    wait_at_gate,
    write_config,
)
from tests.helpers.synthetic_runs import RUN, run_config, write_dataset
from training.checkpoints.files import list_checkpoints
from training.trainer import train

pytestmark = pytest.mark.slow
SHORT = (
    "phases.0.tokens=10K",
    "phases.0.warmup=2K",
    "phases.1.tokens=8K",
    "phases.2.tokens=8K",
    "checkpoint.interval=3K",
)
STEPS = 10 + 4 + 4
PEAK, CLIP = 1e12, 0.5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_dataset(tmp_path_factory.mktemp("prepared"))


def config_file(folder: Path, dataset: Path) -> Path:
    """Without dropout: plain torch, which the lines are held against, draws none by our keys."""
    file = write_config(folder, dataset)
    file.write_text(file.read_text().replace(", out_dropout: 0.1", ""))
    return file


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """One process, a line for every step, microbatches, clipping, wandb."""
    folder = tmp_path_factory.mktemp("alone")
    trainer = [f"trainer.gradient_clip_norm={CLIP}", "trainer.microbatch_size=3", f"trainer.peak_flops={PEAK}"]
    extra = [*trainer, "trainer.price_per_hour=36", "loggers=[tensorboard,{name: wandb,project: test,mode: offline}]"]
    done = run(command("train", str(config_file(folder, dataset)), *SHORT, *extra))
    assert done.returncode == 0, done.stderr
    assert "  grad " in done.stdout
    assert "  MFU " in done.stdout
    return folder


def lines(folder: Path) -> dict[int, dict[str, Any]]:
    """The training lines by step."""
    text = (folder / "runs" / "small" / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, text) if "loss" in line}


def settings(folder: Path) -> RunConfig:
    return load_run_config(folder / "runs" / "small" / "config.yaml")


def test_a_line_is_what_plain_torch_computes(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, line = settings(alone), lines(alone)[1]
    batch = next(iter(build_loader(PhasePlan(config).loader_config(config))))
    inspect_step(alone / "runs" / "small", 1, 0, True, Console())
    pieces = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    streams = [piece["stream"] for piece in pieces for label in piece["labels"] if label != -100]
    model = build(config.model, seed=torch_seed(config.seed, "init"))
    logits = model(batch["input_ids"], batch["cu_seqlens"], batch["max_seqlen"]).logits
    assert logits is not None
    masked = batch["labels"] != -100
    losses = F.cross_entropy(logits[masked], batch["labels"][masked], reduction="none")
    hits = logits[masked].argmax(1) == batch["labels"][masked]
    assert len(streams) == len(losses)
    for name, scores in line["streams"].items():
        own = torch.tensor([stream == name for stream in streams])
        assert scores["masked_tokens"] == int(own.sum())
        assert scores["loss"] == pytest.approx(float(losses[own].detach().mean()), rel=1e-5)
        assert scores["masked_accuracy"] == pytest.approx(float(hits[own].float().mean()), abs=1e-9)
    assert len(line["streams"]) == 2
    assert line["masked_accuracy"] == pytest.approx(float(hits.float().mean()), abs=1e-9)

    losses.mean().backward()
    optimizer = OPTIMIZERS.build(config.optimizer, model=model, lr=2e-3)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = line["lr"]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    assert norm > 1.5 * CLIP
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    before = torch.cat([matrix.detach().flatten().clone() for matrix in matrices])
    optimizer.step()
    change = torch.cat([matrix.detach().flatten() for matrix in matrices]) - before
    # Half of the token table is sampled; measured: 0.4 % off.
    assert line["update_ratio"] == pytest.approx(float(change.norm() / before.norm()), rel=0.02)

    lengths = batch["cu_seqlens"].diff().tolist()
    masked = [int((labels != -100).sum()) for labels in batch["labels"].split(lengths)]
    assert sum(masked) == batch["masked"]
    flops = batch_flops(config.model, lengths, masked)
    tokens = len(batch["input_ids"])
    assert line["flops_per_second"] / line["tokens_per_second"] == pytest.approx(flops / tokens, rel=1e-9)
    assert line["slots_per_second"] / line["tokens_per_second"] == pytest.approx(8 * 128 / tokens, rel=1e-9)
    assert line["mfu"] == pytest.approx(line["flops_per_second"] / PEAK)
    assert 2e8 < line["host_memory_bytes"] < 8e9
    assert "cuda_peak_bytes" not in line


def test_streams_add_up_and_the_forecast_ends_at_the_end(alone: Path) -> None:
    config, all_lines = settings(alone), lines(alone)
    assert sorted(all_lines) == list(range(1, STEPS + 1))
    batches = dict(enumerate(build_loader(PhasePlan(config).loader_config(config)), 1))
    for step, line in all_lines.items():
        scores = line["streams"].values()
        masked = sum(score["masked_tokens"] for score in scores)
        assert masked == batches[step]["masked"]
        assert line["loss"] == pytest.approx(sum(s["loss"] * s["masked_tokens"] for s in scores) / masked, rel=1e-5)
        hits = sum(score["masked_accuracy"] * score["masked_tokens"] for score in scores)
        assert line["masked_accuracy"] == pytest.approx(hits / masked)
    etas = [line["eta_seconds"] for line in all_lines.values()]
    assert min(etas[:-1]) > 0
    assert etas[-1] == 0
    last = all_lines[STEPS]
    summary = json.loads((alone / "runs" / "small" / "summary.json").read_text())
    assert last["cost"] == last["cost_to_end"] == pytest.approx(summary["seconds"] / 100, abs=0.05)  # 36 an hour
    theta = [all_lines[step]["rope_theta"] for step in (10, 11)]
    assert theta == [{"global": 10000.0, "local": 10000.0}, {"global": 160000.0, "local": 10000.0}]


def test_loggers_hold_what_the_lines_hold(alone: Path) -> None:
    """wandb's own record of the offline run, and TensorBoard's events, number by number."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]
    from wandb.sdk.internal.datastore import DataStore

    folder = alone / "runs" / "small"
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    store, history, summary = DataStore(), dict[tuple[str, int], float](), dict[str, Any]()
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        values = {key: json.loads(value) for key, value in items.items()}
        history |= {(key, values.get("_step", record.history.step.num)): value for key, value in values.items()}
        summary |= {"/".join(item.nested_key) or item.key: item.value_json for item in record.summary.update}
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events_by_folder = (
        [events]
        if list((folder / "tensorboard").glob("events*"))
        else [EventAccumulator(str(path), size_guidance={"scalars": 0}) for path in (folder / "tensorboard").iterdir()]
    )
    scalars: dict[tuple[str, int], float] = {}
    for accumulator in events_by_folder:
        accumulator.Reload()
        for tag in accumulator.Tags()["scalars"]:
            scalars |= {(tag, event.step): event.value for event in accumulator.Scalars(tag)}
    for step, line in lines(alone).items():
        expected = {key: line[key] for key in ("loss", "lr", "mfu", "grad_norm", "update_ratio", "eta_seconds", "cost")}
        expected |= {"streams/email-code/loss": line["streams"]["email-code"]["loss"]}
        expected |= {"rope_theta/global": line["rope_theta"]["global"], "host_memory_bytes": line["host_memory_bytes"]}
        for key, value in expected.items():
            assert history[f"train/{key}", step] == pytest.approx(value, rel=1e-12), key
            assert scalars[f"train/{key}", step] == pytest.approx(value, rel=1e-6), key  # float32
    assert ("validation/loss", STEPS) in history


@pytest.mark.long
def test_two_processes_killed_and_resumed_by_one_show_the_same(alone: Path, dataset: Path, tmp_path: Path) -> None:
    """Lines of five steps, from two ranks and then one, against the lines of each step of one; `status` on the way."""
    config = config_file(tmp_path, dataset)
    options = [*SHORT, f"trainer.gradient_clip_norm={CLIP}", "trainer.log_interval=5", f"trainer.peak_flops={PEAK}"]
    options += [f"imports=[{GATE}]", "callbacks=[{name: gate, step: 7}]"]
    folder = tmp_path / "runs" / "small"
    launcher = str(Path(sys.executable).parent / "composer")
    two = subprocess.Popen(
        [launcher, "-n", "2", *command("train", str(config), *options)[1:]],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_at_gate(folder, 2, two.pid)
    live = read_status(folder)
    try:
        again = run(command("train", str(config), *options))
    finally:
        os.killpg(two.pid, signal.SIGKILL)
        two.wait()
    open_gate(folder)
    assert live["state"] == "training"
    assert again.returncode == 1  # looking did not free the lock
    assert f"process {live['process']} is training this run" in again.stderr
    assert (live["phase"], live["steps"], live["total_tokens"]) == ("stable", STEPS, 10 * 1024 + 8 * 2048)
    assert live["loss"] == lines(tmp_path)[live["step"]]["loss"]
    assert live["tokens"] == live["step"] * 1024
    first = lines(tmp_path)[5]
    assert first["mfu"] == pytest.approx(first["flops_per_second"] / (2 * PEAK))
    steps = [lines(alone)[step] for step in range(1, 6)]
    tokens = [
        line["real_tokens"] - before
        for line, before in zip(steps, [0, *(x["real_tokens"] for x in steps)], strict=False)
    ]
    flops = [
        line["flops_per_second"] / line["tokens_per_second"] * count for line, count in zip(steps, tokens, strict=True)
    ]
    assert first["flops_per_second"] / first["tokens_per_second"] == pytest.approx(sum(flops) / sum(tokens), rel=1e-9)

    newest, deadline = list_checkpoints(folder / "checkpoints")[-1], time.monotonic() + 60
    while holder(folder / ".lock") is not None:  # the launcher is gone before its ranks
        assert time.monotonic() < deadline
        time.sleep(0.1)
    dead = read_status(folder)
    assert (dead["state"], dead["process"]) == ("stopped", None)
    assert (dead["checkpoint"]["path"], dead["checkpoint"]["whole"]) == (str(newest), True)
    shutil.copytree(newest, tmp_path / "copy")
    os.truncate(newest / "model.safetensors", 100)
    damaged = read_status(folder)["checkpoint"]
    assert (damaged["whole"], damaged["path"]) == (False, str(newest))
    assert "model.safetensors" in damaged["problem"]
    shutil.rmtree(newest)
    shutil.copytree(tmp_path / "copy", newest)

    done = run(command("train", str(config), *options))
    assert done.returncode == 0, done.stderr
    ours, theirs = lines(tmp_path), lines(alone)
    assert sorted(ours) == [5, 10, 15]
    for step, line in ours.items():
        parts = [theirs[number] for number in range(step - 4, step + 1)]
        assert line["loss"] == pytest.approx(sum(part["loss"] for part in parts) / 5, rel=1e-3)
        assert line["grad_norm"] == pytest.approx(parts[-1]["grad_norm"], rel=0.02)
        assert line["update_ratio"] == pytest.approx(parts[-1]["update_ratio"], rel=0.02)
        for name, scores in line["streams"].items():
            own = [part["streams"][name] for part in parts if name in part["streams"]]
            masked = sum(part["masked_tokens"] for part in own)
            assert scores["masked_tokens"] == masked
            loss = sum(part["loss"] * part["masked_tokens"] for part in own) / masked
            assert scores["loss"] == pytest.approx(loss, rel=1e-3)


def stamps(folder: Path) -> dict[Path, int]:
    """But of wandb's files, whose own process may still close its log."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "wandb" not in path.parts}


def test_status_and_report_of_a_finished_run(alone: Path, tmp_path: Path) -> None:
    folder = alone / "runs" / "small"
    before = stamps(folder)
    shown = CliRunner().invoke(app, ["status", str(folder)], env={"COLUMNS": "10000"})
    told = CliRunner().invoke(app, ["status", str(folder), "--json"])
    assert before == stamps(folder)
    assert (shown.exit_code, told.exit_code) == (0, 0)
    facts = json.loads(told.stdout)
    summary = json.loads((folder / "summary.json").read_text())
    assert (facts["state"], facts["step"], facts["phase"]) == ("finished", STEPS, "decay")
    assert facts["validation"] == {"step": STEPS, **summary["validation"]}
    tokens = {name: counts["tokens"] for name, counts in summary["streams"].items()}
    assert facts["mixture"] == {name: count / sum(tokens.values()) for name, count in tokens.items()}
    assert facts["checkpoint"]["tokens"] == facts["tokens"] == facts["total_tokens"]
    for word in ("finished", "decay, step 18 of 18", "whole", "MFU", "email-code"):
        assert word in shown.stdout
    drawn = CliRunner().invoke(app, ["report", str(folder), "--output", str(tmp_path / "curves.svg")])
    assert drawn.exit_code == 0
    picture = (tmp_path / "curves.svg").read_text()
    for label in ("loss", "learning rate", "rows per step", "RoPE theta", "slots per row", "extension", "held-out"):
        assert f"<!-- {label}" in picture  # matplotlib draws letters, and says in a comment what they are


@pytest.mark.parametrize("arguments", [["status"], ["report"], ["status", "--json"]])
def test_no_run_is_one_line_and_exit_code_2(arguments: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*arguments, str(tmp_path)])
    assert done.exit_code == 2
    nothing = "no run folder (it holds no config.yaml): give runs/NAME"
    if arguments == ["report"]:  # takes a sweep, too
        nothing = "no sweep (it holds no sweep.json) and no run: give the folder that `sweep` has written"
    assert done.stderr == f"error: {tmp_path}: {nothing}\n"


def test_a_torn_line_is_left_out(alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    shutil.copytree(alone / "runs" / "small", folder)
    (folder / "summary.json").unlink()
    file = folder / "metrics.jsonl"
    text = [line for line in file.read_text().splitlines() if json.loads(line)["step"] < 12]
    file.write_text("\n".join(text) + '\n{"step": 12, "tok')
    facts = read_status(folder)
    assert (facts["state"], facts["step"], facts["phase"]) == ("stopped", 11, "extension")
    assert metrics(alone)[11] == facts["loss"]


@register("loss", "test_unscored")
class Unscored:
    """A loss from outside that leaves the scores as they are."""

    class Config(Component):
        pass

    def __init__(self, config: Config) -> None:
        pass

    def __call__(
        self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scores: TokenScores
    ) -> Tensor:
        return F.cross_entropy(F.linear(hidden_states, weight, bias), targets, reduction="sum")


def test_a_loss_without_scores_has_no_number_in_place_of_a_wrong_one(tmp_path: Path) -> None:
    model = {**RUN["model"], "loss": "test_unscored"}
    config = run_config(tmp_path, write_dataset(tmp_path / "data"), "unscored", "phases.0.tokens=2K", model=model)
    train(config, Console(quiet=True))
    text = config.folder.joinpath("metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if "streams" in line and "loss" in line]
    assert lines
    assert "NaN" not in text
    for line in lines:
        assert line["loss"] > 1
        assert line["masked_accuracy"] is None
        assert line["streams"]["words"]["loss"] is line["streams"]["words"]["masked_accuracy"] is None
    shown = CliRunner().invoke(app, ["status", str(config.folder)])
    assert shown.exit_code == 0, shown.output
