"""A sweep that nobody trained: run folders with curves that look like real ones, for the report page."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data.keyed import keyed_generator
from sweeps.results import Arm, RunResult, SweepResult
from sweeps.run_result import read_run

SEED_NOISE = 0.012
"""Nats: standard deviation of a run's final loss that all arms of a seed share."""
PAIR_NOISE = 0.002
"""Nats: what each run has of its own; so a paired difference has the square root of 2 times this."""
STREAMS = {"web": 0.62, "code": 0.23, "papers": 0.15}


def write_sweep(
    folder: Path,
    effects: dict[str, float],
    seeds: Sequence[int],
    lines: int = 200,
    documents: int = 200,
    unfinished: Sequence[tuple[str, int]] = (),
) -> SweepResult:
    """Write run folders and read them back. effects: by arm, how much higher its final loss is in nats; the first arm
    is the baseline. unfinished: cells that stop half way."""
    baseline = next(iter(effects))
    runs: dict[tuple[str, int], RunResult] = {}
    for place, (arm, effect) in enumerate(effects.items()):
        for seed in seeds:
            run = folder / f"{place}-{seed}"
            write_run(run, arm, effect, seed, lines, documents, (arm, seed) not in unfinished, 1 + 0.05 * place)
            runs[arm, seed] = read_run(run, arm, seed)
    keys = ("model.mlp", "model.norm", "masking.rate", "optimizer.name", "model.num_hidden_layers")
    arms = [
        Arm(arm, {} if arm == baseline else {keys[place % len(keys)]: arm}, {}, 22_000_000 + 100_000 * place, 1.3e8)
        for place, arm in enumerate(effects)
    ]
    paired = {cell: True for cell in runs}
    return SweepResult("synthetic", folder, baseline, arms, list(seeds), runs, paired)


def write_run(
    folder: Path, arm: str, effect: float, seed: int, lines: int, documents: int, finished: bool, cost: float = 1.0
) -> None:
    """cost: FLOPs and seconds of a token, relative."""
    folder.mkdir(parents=True)
    shared, own = keyed_generator(seed, "sweep"), keyed_generator(seed, f"sweep/{arm}")
    shift = effect + SEED_NOISE * shared.standard_normal() + PAIR_NOISE * own.standard_normal()
    config = {"name": folder.name, "seed": seed, "runs": str(folder.parent), "model": {"mlp": arm}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text(
        "".join(
            json.dumps(_line(place, lines, shift, own, cost)) + "\n"
            for place in range(1, (lines if finished else lines // 2) + 1)
        )
    )
    total = 1_000_000 * lines
    streams = {
        name: {"tokens": int(share * total), "repeated_tokens": int(max(0, share - 0.2) * total / 3)}
        for name, share in STREAMS.items()
    }
    (folder / "ledger.jsonl").write_text(json.dumps({"step": lines, "tokens": total, "streams": streams}) + "\n")
    if not finished:
        return
    final = _loss(1.0) + shift
    if documents:
        counts = shared.integers(20, 400, documents)
        hard = shared.normal(0, 0.5, documents)
        gaps = own.normal(0, 0.02, documents)
        gaps -= (gaps * counts).sum() / counts.sum()
        hard -= (hard * counts).sum() / counts.sum()
        names = np.array([f"web/{place}" for place in range(documents)])
        np.savez(folder / "held_out_documents.npz", documents=names, sums=(final + hard + gaps) * counts, counts=counts)
    scores = [
        {
            "step": int(lines * part),
            "tokens": int(total * part),
            "evaluation": "glue-quick",
            "scores": {
                "mnli accuracy": 0.5 + 0.3 * part - 0.2 * shift + 0.003 * own.standard_normal(),
                "cola mcc": 0.1 + 0.4 * part - 0.3 * shift + 0.01 * own.standard_normal(),
            },
        }
        for part in (0.25, 0.5, 0.75, 1.0)
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scores))
    summary = {"steps": lines, "tokens": total, "tokens_per_second": 2e5, "packing_efficiency": 0.99, "export": None}
    summary |= {"validation": {"loss": final, "masked_tokens": 10_000}, "stream_tokens": {}}
    (folder / "summary.json").write_text(json.dumps(summary))


def _loss(share: float) -> float:
    """At a share of the budget."""
    return 2.1 + 5.2 * math.exp(-9 * share) + 0.5 * (1 - share)


def _line(place: int, lines: int, shift: float, rng: np.random.Generator, cost: float) -> dict[str, Any]:
    share, speed = place / lines, 2e5 / cost * (1 + 0.02 * rng.standard_normal())
    loss = _loss(share) + shift * share + 0.03 * rng.standard_normal()
    line: dict[str, Any] = {
        "step": place,
        "tokens": 1_000_000 * place,
        "loss": loss,
        "lr": 8e-4 * min(1.0, 20 * share) * (1 - max(0.0, share - 0.8) * 4.5),
        "streams": {name: {"loss": loss + gap} for name, gap in zip(STREAMS, (0.0, -0.4, 0.25), strict=True)},
        "tokens_per_second": 0.99 * speed,
        "slots_per_second": speed,
        "flops_per_second": 1.3e8 * cost * speed,
        "mfu": 1.3e8 * cost * speed / 1e14,
        "host_memory_bytes": int(2.1e9 + 1e7 * cost + 1e6 * rng.standard_normal()),
    }
    if place % max(lines // 20, 1) == 0 or place == lines:
        held = _loss(share) + shift * share
        streams = {name: {"loss": held + gap} for name, gap in zip(STREAMS, (0.0, -0.4, 0.25), strict=True)}
        line["validation"] = {"loss": held, "masked_tokens": 10_000, "streams": streams}
    return line
