"""What our training step costs over a bare loop, and how long a checkpoint stops it.

`python -m benchmarks.overhead [--model NAME] [--rounds N] [--steps 10] [KEY=VALUE ...]` prints JSON lines. What users
have is a step of a second or more: `10x384`, ten layers of width 384, takes about one on two cores, and its bar is 3 %.
The step of `demo`, a fifth of that, is reported beside it. Of each two processes take turns, a round of so many steps
each, so that noise of the machine meets both:

    run    the real one, configs/demo.yaml as `main.py train` runs it: loader with its workers, Composer, all callbacks
           and loggers, guards; with a line of metrics each 10 steps, as by default (trainer.log_interval)
    bare   the same model, optimizer and batches in a loop: forward, backward, optimizer step, zero_grad

`overhead` is run / bare - 1, where each is the sum over the steps of a round of the median over the rounds: what comes
in each step or in one of ten counts, a burst of a neighbour's work does not. `of_rounds` is the median of the rounds'
own ratios, `standard_error` that of `overhead`, by resampling the rounds. Then the run goes on by itself, saves at
every tenth step, and `blocked` is the median time of a step with a save, less that of a step without one.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from rich.console import Console

from benchmarks.arguments import count, override, parser_of
from callbacks.watchdog import Watchdog
from data.feed.loader import build_loader
from recipe.config import RunConfig, load_run_config
from recipe.phases import PhasePlan
from training.allocator import keep_freed_memory
from training.run import Run
from training.trainer import quiet_libraries

ROOT = Path(__file__).parent.parent
WARM = 3
# Of the run, and how many rounds.
MODELS = {
    "10x384": (
        "model={preset: modernbert-tiny, num_hidden_layers: 10, hidden_size: 384, num_attention_heads: 6, "
        "intermediate_size: 576}",
        20,
    ),
    "demo": ("model=modernbert-tiny", 100),
}
BAR = {"10x384": 0.03}
# Beginnings of keys that would change one side alone, or that `config_of` sets: the bare loop has the run's model,
# optimizer, batches and autocast.
UNFAIR = (
    *("trainer=", "trainer.microbatch_size", "trainer.parallelism", "trainer.gradient_clip_norm"),
    *("trainer.spike_guard", "ema", "from", "runs", "phases", "checkpoint"),
)


def config_of(runs: Path, steps: int, save_every: int | None, overrides: list[str]) -> RunConfig:
    """The demo's first phase, so many steps long."""
    per_step = 4 * 512
    interval = save_every * per_step if save_every else steps * per_step * 10
    return load_run_config(
        ROOT / "configs" / "demo.yaml",
        [
            f"runs={runs}",
            f"phases=[{{name: stable, tokens: {steps * per_step}, max_seq_len: 512, global_batch_size: 4, lr: 1e-3}}]",
            f"checkpoint.interval={interval}",
            "evaluation={max_rows: 4, max_seq_len: 512}",
            *overrides,
        ],
    )


class Gate:
    """Passed before each step: at a round's end writes the seconds of its steps, and waits for a line on stdin."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done, self.marks = steps, -WARM, [0.0]

    def pass_by(self) -> bool:
        """False when there is nothing more to do."""
        if self.done >= 0:
            self.marks.append(time.perf_counter())
            if self.done % self.steps == 0:
                if self.done:
                    print(json.dumps([after - mark for mark, after in itertools.pairwise(self.marks)]), flush=True)
                if not sys.stdin.readline():
                    return False
                self.marks = [time.perf_counter()]
        self.done += 1
        return True


class GateCallback(Callback):
    """The gate in a run."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self.gate.pass_by()


class Watch(Callback):
    """Seconds from the end of each step to the end of the next, whatever happens between."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self.ends.append(time.perf_counter())


def run_steps(config: RunConfig, *watching: Callback) -> Run:
    """The real run, watched."""
    quiet_libraries()
    keep_freed_memory()
    with Watchdog(config.trainer.hang_timeout) as watchdog:
        run = Run(config, Console(quiet=True), watchdog)
        run.open()
        step = run.resume()
        # First in the list: what other callbacks do before a step belongs to the step.
        run.trainer.state.callbacks[:0] = list(watching)
        try:
            run.fit(step)
        finally:
            run.close()
    return run


def bare(config: RunConfig, steps: int) -> None:
    """A loop over batches that are there before it starts."""
    keep_freed_memory()
    with Watchdog(config.trainer.hang_timeout) as watchdog:
        run = Run(config, Console(quiet=True), watchdog)
    model, optimizer = run.model, run.optimizer
    loader = build_loader(PhasePlan(config).loader_config(config))
    batches = [batch for batch, _ in zip(loader, range(steps), strict=False)]
    gate = Gate(steps)
    while gate.pass_by():
        batch = batches[gate.done % steps]
        names = ("input_ids", "cu_seqlens", "max_seqlen", "labels")
        with run.autocast():
            loss = model(*(batch[name] for name in names), num_masked=batch["masked"]).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def blocked(runs: Path, overrides: list[str]) -> dict[str, Any]:
    """Times of steps with and without a save."""
    every, count = 10, 80
    watch = Watch()
    run_steps(config_of(runs, count, every, overrides), watch)
    spans = [after - before for before, after in zip(watch.ends, watch.ends[1:], strict=False)]
    saving = [span for step, span in enumerate(spans, 1) if step % every == 0]
    plain = [span for step, span in enumerate(spans, 1) if step % every and step > WARM]
    step = statistics.median(plain)
    return {
        "step_seconds": round(step, 4),
        "blocked_seconds": round(statistics.median(saving) - step, 4),
        "blocked_share_of_a_step": round(statistics.median(saving) / step - 1, 3),
        "saves": len(saving),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", choices=list(MODELS), help="one of them; default: both")
    parser.add_argument("--rounds", type=count, help="default: 20 and 100")
    parser.add_argument("--steps", type=count, default=10, help="of a round")
    parser.add_argument("--serve", choices=["run", "bare", "blocked"], help=argparse.SUPPRESS)
    parser.add_argument("overrides", type=override, nargs="*", help="of the run: KEY=VALUE")
    arguments = parser.parse_args()
    for given in arguments.overrides:
        if given.startswith(UNFAIR):
            parser.error(f"{given}: {given.partition('=')[0]}: the bare loop has nothing of the kind, or both set it")
    if not arguments.serve:
        for name in [arguments.model] if arguments.model else MODELS:
            compare(name, arguments.rounds or MODELS[name][1], arguments.steps, arguments.overrides)
        return
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        steps = (arguments.rounds + 1) * arguments.steps + 10
        if arguments.serve == "run":
            run_steps(config_of(Path(folder), steps, None, arguments.overrides), GateCallback(Gate(arguments.steps)))
        elif arguments.serve == "bare":
            bare(config_of(Path(folder), steps, None, arguments.overrides), arguments.steps)
        else:
            print(json.dumps(blocked(Path(folder), arguments.overrides)))


def overhead_of(run: np.ndarray, bare: np.ndarray) -> float:
    """Of seconds (rounds, steps): see the module."""
    return float(np.median(run, 0).sum() / np.median(bare, 0).sum() - 1)


def compare(name: str, rounds: int, steps: int, overrides: list[str]) -> None:
    """Let the two take turns, and print what it gave."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--rounds", str(rounds), "--steps", str(steps)]
    command += [MODELS[name][0], *overrides]
    processes = {
        who: subprocess.Popen([*command, "--serve", who], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for who in ("run", "bare")
    }
    took: dict[str, list[list[float]]] = {who: [] for who in processes}
    for _ in range(rounds):
        for who, process in processes.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            took[who].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.kill()
        process.wait()
    run, bare = (np.array(values) for values in took.values())  # (rounds, steps), seconds
    draws = np.random.default_rng(0).integers(rounds, size=(1000, rounds))
    ratios = run.sum(1) / bare.sum(1) - 1
    found = {
        "run_step_seconds": np.median(run, 0).mean(),
        "bare_step_seconds": np.median(bare, 0).mean(),
        "overhead": overhead_of(run, bare),
        "standard_error": np.std([overhead_of(run[draw], bare[draw]) for draw in draws]),
        "of_rounds": np.median(ratios),
    }
    found = {name: round(float(value), 4) for name, value in found.items()}
    rows = {"rounds": [round(float(ratio), 3) for ratio in ratios]}
    bar = {"bar": BAR[name]} if name in BAR else {}
    line = {"benchmark": "overhead", "model": name, "steps_of_a_round": steps, **found, **bar}
    print(json.dumps({**line, **rows}), flush=True)
    saved = subprocess.run([*command, "--serve", "blocked"], check=True, capture_output=True, text=True)
    print(json.dumps({"benchmark": "overhead", "model": name, **json.loads(saved.stdout.splitlines()[-1])}))


if __name__ == "__main__":
    main()
