"""The time in which FlexBERT reaches the held-out loss that transformers' Trainer ends with (benchmarks.trainer_peer).

`python -m benchmarks.time_to_loss FOLDER [--tokens 1000000] [--seeds 0 1 2] [--config configs/speedrun/cpu.yaml]`.
Same text, tokenizer, architecture, starting weights, row length and cores. FOLDER keeps every run, so that the same
command goes on; another config wants another FOLDER. What is tried, on a seed of its own, is not what is reported:

1. The peer trains with each of five learning rates, with 8 rows a step, its default, and with as few as ours. What ends
   with the lowest held-out loss is its own.
2. We look by halving for the least of a list of budgets that reaches that loss. The next larger one is ours: seeds
   differ.
3. Both train with each of the seeds, by turns. A JSON line for each: both losses, seconds, and the ratio; then the mean
   ratio with its interval of 95 % over seeds (Student's t of the logarithms), and whether the loss was reached in all.

Seconds are those of training alone, without start-up, evaluation and saving, on both sides. The loss of both is that of
`main.py speedrun verify`: nats a hidden token over the validation splits, on the same documents and hidden tokens.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from benchmarks.arguments import count, parser_of
from commands.speedrun import held_out_loss
from data.feed.loader import tokenizer_folder
from data.keyed import torch_seed
from flexbert import build, to_hf
from recipe.config import load_run_config
from recipe.track import Track, load_track

ROOT = Path(__file__).parent.parent
LRS = (3e-4, 1e-3, 2e-3, 4e-3, 8e-3)
ROWS = 8  # a step: what TrainingArguments say by default
SHARES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the peer's tokens
TRIED = 1000  # the seed of both searches


class Race:
    """Runs that are there are not trained again."""

    def __init__(self, folder: Path, file: Path, track: Track, tokens: int) -> None:
        self.folder, self.file, self.track, self.tokens = folder, file, track, tokens
        self.config = load_run_config(file)

    def peer(self, seed: int, lr: float, rows: int) -> tuple[float, float]:
        """(held-out loss, seconds) of the Trainer, with so many rows a step, from our starting weights of this seed."""
        start, output = self.folder / f"start-{seed}", self.folder / f"peer-{seed}-{self.tokens}-{lr:g}-{rows}"
        if not start.exists():
            to_hf(build(self.config.model, seed=torch_seed(seed, "init")), tokenizer_folder(self.config.data), start)
        if not (output / "facts.json").exists():
            options = ["--tokens", str(self.tokens), "--lr", str(lr), "--rows", str(rows), "--seed", str(seed)]
            _call("-m", "benchmarks.trainer_peer", str(self.file), str(start), str(output), *options)
        return self._loss(output), json.loads((output / "facts.json").read_text())["seconds"]

    def ours(self, seed: int, tokens: int) -> tuple[float, float]:
        """The same of our recipe with so many tokens, which its phases share as the file has it."""
        name = f"ours-{seed}-{tokens}"
        run = self.folder / name
        if not (run / "summary.json").exists():
            options = [f"runs={self.folder}", f"name={name}", f"seed={seed}"]
            whole = sum(phase.tokens for phase in self.config.phases)
            for number, phase in enumerate(self.config.phases):
                share = round(phase.tokens / whole * tokens)
                options.append(f"phases.{number}.tokens={share}")
                options.append(f"phases.{number}.warmup={min(phase.warmup, share // 5)}")
            _call("main.py", "train", str(self.file), *options)
        summary = json.loads((run / "summary.json").read_text())
        return self._loss(Path(summary["export"])), summary["train_seconds"]

    def _loss(self, model: Path) -> float:
        return held_out_loss(self.config, model, self.track)


def _call(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def say(**facts: Any) -> None:
    print(json.dumps({"benchmark": "time_to_loss", **facts}), flush=True)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "speedrun" / "cpu.yaml")
    parser.add_argument("--track", type=Path, default=ROOT / "configs" / "speedrun" / "track-cpu.yaml")
    parser.add_argument("--tokens", type=count, default=1_000_000, help="of the peer [1000000]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    race = Race(given.folder.resolve(), given.config.resolve(), load_track(given.track), given.tokens)
    race.folder.mkdir(parents=True, exist_ok=True)

    few = race.config.phases[0].global_batch_size
    assert few is not None
    found: dict[tuple[float, int], float] = {}
    for rows in (ROWS, few):
        for lr in LRS:
            found[lr, rows], seconds = race.peer(TRIED, lr, rows)
            say(side="peer", lr=lr, rows=rows, loss=found[lr, rows], seconds=seconds)
    lr, rows = min(found, key=found.__getitem__)
    first, last = 0, len(SHARES) - 1
    while first < last:
        middle = (first + last) // 2
        budget = round(SHARES[middle] * race.tokens)
        loss, seconds = race.ours(TRIED, budget)
        say(side="ours", tokens=budget, loss=loss, seconds=seconds)
        first, last = (first, middle) if loss <= found[lr, rows] else (middle + 1, last)
    budget = round(SHARES[min(first + 1, len(SHARES) - 1)] * race.tokens)
    logs, reached = [], True
    for seed in given.seeds:
        theirs, their_seconds = race.peer(seed, lr, rows)
        ours, our_seconds = race.ours(seed, budget)
        logs.append(math.log(our_seconds / their_seconds))
        reached &= ours <= theirs
        facts = {"peer_loss": theirs, "our_loss": ours, "peer_seconds": their_seconds, "our_seconds": our_seconds}
        say(seed=seed, **facts, ratio=our_seconds / their_seconds)
    mean, count_ = float(np.mean(logs)), len(logs)
    half = float(scipy.stats.t.ppf(0.975, count_ - 1) * np.std(logs, ddof=1) / count_**0.5) if count_ > 1 else math.inf
    interval = [math.exp(mean - half), math.exp(mean + half)]
    say(peer_lr=lr, peer_rows=rows, tokens=budget, ratio=math.exp(mean), interval=interval, reached_by_all=reached)


if __name__ == "__main__":
    main()
