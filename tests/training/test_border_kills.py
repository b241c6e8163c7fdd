"""A run of two objectives on two processes is killed on both sides of the border and in its second phase, and ends with
the bits of one that was not."""

import signal
from pathlib import Path
from typing import Any

import pytest

import flexbert
from flexbert import build
from recipe.config import load_run_config
from tests.helpers.ranks import Ranks
from tests.helpers.runs import ROOT
from tests.helpers.tiny import ROW, ROWS, write_config

pytestmark = pytest.mark.slow
STEPS, TOKENS = 6, 3 * ROWS * ROW
SHAPE = {"max_seq_len": ROW, "global_batch_size": ROWS, "lr": 1e-2}
PAIRS: dict[str, list[Any]] = {
    "clm-mlm": ["clm", "mlm"],
    "mlm-rtd": ["mlm", {"name": "rtd", "generator": {"num_hidden_layers": 1}}],
    "mlm-diffusion": ["mlm", "diffusion"],
    "mlm-distill": ["mlm", {"name": "distill", "layers": [{"student": 2, "teacher": 1}]}],
}
KILLS = [3, 4, 5]


def write(folder: Path, data: Path, pair: str, teacher: Path, **changes: Any) -> Path:
    phases = [
        {"name": f"phase-{number}", "tokens": TOKENS, **SHAPE, "objective": objective}
        for number, objective in enumerate(PAIRS[pair])
    ]
    if pair == "mlm-distill":
        phases[1]["objective"] = {**PAIRS[pair][1], "teacher": str(teacher)}
    return write_config(folder, data, STEPS, "full", "sparse", phases=phases, **changes)


@pytest.fixture(scope="module")
def teacher(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    config = load_run_config(write_config(folder, tiny_data, 1, model={"hidden_size": 24}))
    flexbert.to_hf(build(config.model, seed=8), tiny_data / "tokenizer", folder / "export")
    return folder / "export"


def files(folder: Path) -> dict[str, bytes]:
    checkpoint = folder / "run" / "checkpoints" / f"tokens-{2 * TOKENS}"
    found = [checkpoint / "model.safetensors", checkpoint / "optimizer.safetensors"]
    for kind in ("exports", "generators", "detectors"):
        found += sorted((folder / "run" / kind).glob("*/model.safetensors"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


@pytest.mark.parametrize("pair", PAIRS)
def test_two_processes_end_with_the_same_bits(
    ranks: Ranks, tiny_data: Path, teacher: Path, tmp_path: Path, pair: str
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    ranks.train(2, str(write(straight, tiny_data, pair, teacher)))
    killer = {
        "imports": [str(ROOT / "tests" / "helpers" / "killer.py")],
        "callbacks": [{"name": "killer", "steps": KILLS, "event": "after_backward"}],
    }
    file = write(killed, tiny_data, pair, teacher, **killer)
    for _ in KILLS:
        codes, text = ranks.run(2, "train", str(file))
        assert -signal.SIGKILL in codes, text
    ranks.train(2, str(file))
    assert files(killed) == files(straight)
