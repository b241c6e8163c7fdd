"""Runs whose phases mask whole words, spans, and at a rate that moves: killed, on two ranks, and shown again."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.feed.loader import build_loader
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from tests.helpers.ranks import Ranks
from tests.helpers.runs import ROOT, environment
from tests.helpers.tiny import ROW, ROWS, check_same, write_config

STEPS = 6
KEPT = ("model.safetensors", "optimizer.safetensors")
SHAPE = {"max_seq_len": ROW, "global_batch_size": ROWS, "lr": 1e-2}
PHASES: list[dict[str, Any]] = [
    {"name": "words", "tokens": 3 * ROWS * ROW, **SHAPE, "masking": {"name": "words", "rate": 0.4, "rate_schedule": {"to": 0.1}}},
    {"name": "spans", "tokens": 3 * ROWS * ROW, "masking": {"name": "spans", "rate": 0.3, "rate_schedule": {"to": 0.2, "shape": "cosine"}}},
]  # fmt: skip


def bits(folder: Path) -> list[bytes]:
    return [(folder / "run" / "checkpoints" / f"tokens-{STEPS * ROWS * ROW}" / file).read_bytes() for file in KEPT]


@pytest.fixture(scope="module")
def straight(ranks: Ranks, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    ranks.train(1, str(write_config(folder, tiny_data, STEPS, "full", "sparse", phases=PHASES)))
    return folder


@pytest.mark.slow
def test_killed_in_each_phase_and_on_the_border(ranks: Ranks, tiny_data: Path, straight: Path, tmp_path: Path) -> None:
    kills = [2, 3, 5]
    file = write_config(
        tmp_path,
        tiny_data,
        STEPS,
        "full",
        "sparse",
        phases=PHASES,
        imports=[str(ROOT / "tests" / "helpers" / "killer.py")],
        callbacks=[{"name": "killer", "steps": kills, "event": "after_backward"}],
    )
    for _ in kills:
        assert ranks.run(1, "train", str(file))[0] == [-signal.SIGKILL]
    ranks.train(1, str(file))
    assert bits(tmp_path) == bits(straight)


def test_two_ranks_and_microbatches_train_the_same(
    ranks: Ranks, tiny_data: Path, straight: Path, tmp_path: Path
) -> None:
    options = {"log_interval": 1, "microbatch_size": 3}
    ranks.train(2, str(write_config(tmp_path, tiny_data, STEPS, "full", "sparse", phases=PHASES, trainer=options)))
    check_same(tmp_path, straight)


@pytest.mark.slow
def test_a_step_is_shown_as_it_was(straight: Path) -> None:
    config = load_run_config(straight / "train.yaml")
    batches = list(build_loader(PhasePlan(config).loader_config(config)))
    shares = []
    for step in (1, 3, 6):
        done = subprocess.run(
            [sys.executable, "main.py", "inspect", str(straight / "run"), "--step", str(step), "--rows", "0", "--json"],
            cwd=ROOT, env=environment(), capture_output=True, text=True, check=True,
        )  # fmt: skip
        shown = [json.loads(line) for line in done.stdout.splitlines()]
        batch = batches[step - 1]
        bounds = batch["cu_seqlens"].tolist()
        for piece, begin, end in zip(shown, bounds, bounds[1:], strict=False):
            assert piece["labels"] == batch["labels"][begin + 1 : end - 1].tolist()
            assert piece["input_ids"] == batch["input_ids"][begin + 1 : end - 1].tolist()
        shares.append(batch["masked"])
    assert shares[0] > shares[1]
