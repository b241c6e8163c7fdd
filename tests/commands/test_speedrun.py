"""`main.py speedrun verify`: losses are recomputed, rules are looked at, and chance is ruled out."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM
from typer.testing import CliRunner

from commands.speedrun import chance, held_out_loss
from data.feed.loader import open_streams
from main import app
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from recipe.track import Track
from tests.helpers.in_process import go
from tests.helpers.runs import ROOT
from tests.helpers.tiny import write_config, write_data
from training.document_losses import HeldOutDocuments

SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three of one recipe on stream `full`, finished."""
    folder = tmp_path_factory.mktemp("speedrun")
    data = write_data(folder / "data")
    files = [write_config(folder / f"s{seed}", data, 3, "full", seed=seed) for seed in SEEDS]
    return [go(file) for file in files]


def track_of(run: Path, **changes: Any) -> dict[str, Any]:
    config = load_run_config(run / "config.yaml")
    splits = {"streams": "train", "validation": "validation"}
    prints = {key: {"full": open_streams(config.data, split)[0].fingerprint} for key, split in splits.items()}
    return {"name": "tiny", "target_loss": 100.0, "held_out": {"max_seq_len": 32}, **prints, **changes}


def verify(runs: list[Path], folder: Path, code: int, **changes: Any) -> str:
    file = folder / "track.yaml"
    OmegaConf.save(OmegaConf.create(track_of(runs[0], **changes)), file)
    arguments = ["speedrun", "verify", *map(str, runs), "--track", str(file)]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "10000"})
    assert done.exit_code == code, done.output
    return done.output


def loss_of(run: Path) -> float:
    export = next(iter((run / "exports").iterdir()))
    return held_out_loss(load_run_config(run / "config.yaml"), export, Track.model_validate(track_of(run)))


def test_the_loss_is_that_of_transformers_on_the_same_hidden_tokens(runs: list[Path], tmp_path: Path) -> None:
    run, config = runs[0], load_run_config(runs[0] / "config.yaml")
    track = Track.model_validate(track_of(run, held_out={"max_seq_len": 32, "rate": 0.3}))
    export = next(iter((run / "exports").iterdir()))
    settings = {
        "max_seq_len": 32,
        "masking": {"name": "tokens", "rate": 0.3, "mask_fraction": 1.0, "random_fraction": 0.0},
    }
    options = HeldOutDocuments.Config.model_validate(settings)
    measure = HeldOutDocuments(options, run=config, plan=PhasePlan(config), streams=(), folder=tmp_path)
    model, total, count = AutoModelForMaskedLM.from_pretrained(export), 0.0, 0
    for make in measure.documents_of(measure.streams["full"]):
        batch = make()
        logits = model(input_ids=batch["input_ids"][None]).logits[0]  # one piece each
        total += float(F.cross_entropy(logits, batch["labels"], reduction="sum"))
        count += int((batch["labels"] != -100).sum())
    assert count > 20
    assert held_out_loss(config, export, track) == pytest.approx(total / count, rel=1e-4)


def test_runs_under_the_target_are_verified(runs: list[Path], tmp_path: Path) -> None:
    losses = [loss_of(run) for run in runs]
    told = verify(runs, tmp_path, 0, target_loss=max(losses) + 1)
    assert told.endswith("verified\n")
    assert "not verified" not in told
    for run, seed, loss in zip(runs, SEEDS, losses, strict=True):
        summary = json.loads((run / "summary.json").read_text())
        row = next(line for line in told.splitlines() if str(run) in line)
        cells = [cell.strip() for cell in row.split("│")[1:-1]]
        assert cells == [str(run), str(seed), f"{loss:.4f}", f"{summary['train_seconds']:.1f}", "kept"]


def test_the_track_of_the_cpu_is_the_default(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, ["speedrun", "verify", str(runs[0])], env={"COLUMNS": "10000"})
    assert done.exit_code == 1, done.output
    assert "the track's is None" in done.output
    assert "stdlib-code/validation: is missing" in done.output


def test_a_mean_that_chance_may_have_put_there_is_not(runs: list[Path], tmp_path: Path) -> None:
    losses = [loss_of(run) for run in runs]
    told = verify(runs, tmp_path, 1, target_loss=float(np.mean(losses)) + 1e-4)
    assert told.endswith("not verified\n")
    assert "needs two runs at least" in verify(runs[:1], tmp_path, 1)


def test_chance_is_students() -> None:
    """By its definition: t of 3 losses with 2 degrees of freedom, whose distribution function is known in closed form."""
    losses, target = np.array([1.0, 1.2, 1.1]), 1.3
    t = (losses.mean() - target) / (losses.std(ddof=1) / 3**0.5)
    assert chance(losses, target) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t**2)))
    assert math.isnan(chance(losses[:1], target))
    assert chance(np.array([1.0, 1.0]), 1.0) == 1.0
    assert chance(np.array([1.0, 1.0]), 1.1) == 0.0


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"streams": {"full": "0000"}}, "full/train: "),
        ({"streams": {"other": "0000"}}, "the track's is None"),
        ({"validation": {"full": "0000"}}, "full/validation: "),
        ({"cores": 1}, " threads, 1 are allowed"),
    ],
)
def test_rules_are_looked_at(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], fault: str
) -> None:
    if "cores" in changes:
        run = Path(shutil.copytree(runs[0], tmp_path / "copy"))
        machine = json.loads((run / "environment.json").read_text())
        (run / "environment.json").write_text(json.dumps({**machine, "torch_threads": 8}))
        assert "8" + fault in verify([run], tmp_path, 1, **changes)
        return
    told = verify(runs, tmp_path, 1, **changes)
    assert fault in told
    assert told.endswith("not verified\n")


def test_a_run_that_starts_from_another_breaks_the_rules(runs: list[Path], tmp_path: Path) -> None:
    data = runs[0].parent.parent / "data"
    origin = next(iter((runs[0] / "exports").iterdir()))
    run = go(write_config(tmp_path / "branch", data, 2, "full", **{"from": str(origin)}))
    assert f"from: starts from {origin}" in verify([run], tmp_path, 1)


def test_weights_that_are_not_the_runs_have_their_own_loss(runs: list[Path], tmp_path: Path) -> None:
    """What summary.json says of the loss is not asked."""
    run = Path(shutil.copytree(runs[0], tmp_path / "copy"))
    file = next(iter((run / "exports").iterdir())) / "model.safetensors"
    save_file({key: torch.zeros_like(value) for key, value in load_file(file).items()}, file, {"format": "pt"})
    assert loss_of(run) == pytest.approx(math.log(64), rel=1e-3)  # 64 tokens, all alike


def test_what_cannot_be_verified_is_refused(runs: list[Path], tmp_path: Path) -> None:
    assert "is given twice" in verify([runs[0], runs[0]], tmp_path, 2)
    same = Path(shutil.copytree(runs[0], tmp_path / "same"))
    assert f"has the seed of {runs[0]}, 1" in verify([runs[0], same], tmp_path, 2)
    (same / "summary.json").unlink()
    assert "is not finished" in verify([same], tmp_path, 2)
    assert "unknown key" in verify(runs, tmp_path, 2, target=3.0)
    shutil.copytree(runs[1], tmp_path / "gone")
    for name in ("environment.json", "ledger.jsonl"):
        file = tmp_path / "gone" / name
        held = file.read_bytes()
        file.unlink()
        assert f"error: {file}: missing or damaged" in verify([tmp_path / "gone"], tmp_path, 2)
        file.write_bytes(held)
    shutil.rmtree(tmp_path / "gone" / "exports")
    told = verify([tmp_path / "gone"], tmp_path, 2)
    assert "is gone: restore it" in told
    assert "train" not in told  # which would write another environment.json


def test_runs_differ_in_their_seed_alone(runs: list[Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(runs[1], tmp_path / "other"))
    file, text = other / "config.yaml", (runs[1] / "config.yaml").read_text()
    for before, after, key in (
        ("lr: 0.01", "lr: 0.02", f"phases.0.lr is 0.02, of {runs[0]} 0.01"),
        ("skip_steps: []", "skip_steps: ['2']", f"trainer.skip_steps is [2], of {runs[0]} []"),
    ):
        assert before in text
        file.write_text(text.replace(before, after))
        assert f"{other}: {key}: runs of a record differ" in verify([runs[0], other, runs[2]], tmp_path, 2)


def test_the_data_are_those_that_were_trained_on(runs: list[Path], tmp_path: Path) -> None:
    """Whatever lies at their path now."""
    run = Path(shutil.copytree(runs[0], tmp_path / "run"))
    ledger = run / "ledger.jsonl"
    (trained,) = {json.loads(line)["data"]["full"] for line in ledger.read_text().splitlines()}
    ledger.write_text(ledger.read_text().replace(trained, "0" * len(trained)))
    assert f"full/train: {'0' * len(trained)}, the track's is {trained}" in verify([run], tmp_path, 1)
