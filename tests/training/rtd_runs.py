"""Small runs of `mlm`, then `rtd`, for the tests beside this."""

import json
from pathlib import Path
from typing import Any

from flexbert import build
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from tests.helpers.tiny import ROW, ROWS, write_config
from training.objectives.phases import Objectives

STEPS = 6
KEPT = ("model.safetensors", "optimizer.safetensors")
TOKENS = 3 * ROWS * ROW
SHAPE = {"max_seq_len": ROW, "global_batch_size": ROWS, "lr": 1e-2}
RTD: dict[str, Any] = {"name": "rtd", "generator": {"num_hidden_layers": 1}}
PHASES: list[dict[str, Any]] = [
    {"name": "masked", "tokens": TOKENS, **SHAPE, "masking": {"rate": 0.3, "mask_fraction": 1.0, "random_fraction": 0.0}, "rope_theta": {"global_layers": 10000.0}},
    {"name": "replaced", "tokens": TOKENS, "objective": RTD, "rope_theta": {"global_layers": 160000.0}},
]  # fmt: skip


def write(folder: Path, data: Path, *streams: str, **changes: Any) -> Path:
    return write_config(folder, data, STEPS, *(streams or ("full", "sparse")), **{"phases": PHASES, **changes})


def made(file: Path) -> tuple[Any, Any, Any]:
    """Config, model with its parts, and the objective of the last phase."""
    config = load_run_config(file)
    model = build(config.model, seed=1)
    return config, model, Objectives(config, PhasePlan(config), model).each[-1]


def files(folder: Path) -> dict[str, bytes]:
    run = folder / "run"
    found = [run / "checkpoints" / f"tokens-{2 * TOKENS}" / name for name in KEPT]
    for kind in ("exports", "generators", "detectors"):
        found += sorted((run / kind).glob("*/model.safetensors")) + sorted((run / kind).glob("*/config.json"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
