"""What a run's `evaluations` cost its steps, where a core is free for them.

`python -m benchmarks.evaluating [--rounds N] [--steps 10] [KEY=VALUE ...]` prints a JSON line. It needs two cores, and
the dataset of configs/data/demo.yaml. Two runs of the model `10x384` of benchmarks.overhead take turns, a round of so
many steps each, on all cores but one:

    with     its checkpoint after two steps is evaluated by configs/eval/masked.yaml, on one core, during all its rounds
    without  the same run with the same checkpoint, without the entry

While one has its turn the other waits, and so does the evaluation. `cost` is with / without - 1, reckoned as `overhead`
in benchmarks.overhead, with its standard error; the bar is 1 %.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks.arguments import count, override, parser_of
from benchmarks.overhead import MODELS, ROOT, Gate, GateCallback, config_of, overhead_of, run_steps

SIDES = ("with", "without")
BAR = 0.01
_BUSY = 30  # seconds that an evaluation has computed when the rounds begin: its imports are behind it
OURS = ("evaluations", "phases", "runs", "data", "checkpoint", "name", "model=")  # beginnings of keys
DATA = ROOT / "datasets" / "demo"


def serve(side: str, steps: int, of_a_round: int, overrides: list[str]) -> None:
    """Train in turns, until stdin ends."""
    first = 2 * 4 * 512  # tokens of two steps
    phase = "max_seq_len: 512, global_batch_size: 4, lr: 1e-3"
    rest = steps * 4 * 512
    phases = f"phases=[{{name: first, tokens: {first}, {phase}}}, {{name: stable, tokens: {rest}, {phase}}}]"
    # More text than any number of rounds gets through.
    values = f"set: [data={DATA}, rows=1000000, documents=1000000]"
    entry = f"evaluations=[{{name: eval, files: [masked], {values}}}]"
    with tempfile.TemporaryDirectory() as folder:
        chosen = [phases, *([entry] if side == "with" else []), *overrides]
        run_steps(config_of(Path(folder), steps, None, chosen), GateCallback(Gate(of_a_round)))


def evaluation_of(process: subprocess.Popen[str]) -> psutil.Process:
    """The process that evaluates for this run, once it computes."""
    while True:
        for child in psutil.Process(process.pid).children():
            if "follow" in child.cmdline() and sum(child.cpu_times()[:2]) > _BUSY:
                return child
        if process.poll() is not None:
            raise SystemExit("error: the run with evaluations ended before its rounds")
        time.sleep(0.5)


def compare(rounds: int, steps: int, overrides: list[str]) -> None:
    """Let the two take turns, and print what it gave."""
    command = [sys.executable, "-m", "benchmarks.evaluating", "--rounds", str(rounds), "--steps", str(steps)]
    threads = str(max(len(os.sched_getaffinity(0)) - 1, 1))
    processes = {
        side: subprocess.Popen(
            [*command, *overrides, "--serve", side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )
        for side in SIDES
    }
    evaluation = evaluation_of(processes["with"])
    took: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    computed = 0.0
    for _ in range(rounds):
        for side, process in processes.items():
            assert process.stdin is not None
            assert process.stdout is not None
            os.killpg(evaluation.pid, signal.SIGCONT if side == "with" else signal.SIGSTOP)
            before, since = sum(evaluation.cpu_times()[:2]), time.perf_counter()
            process.stdin.write("go\n")
            process.stdin.flush()
            took[side].append(json.loads(process.stdout.readline()))
            if side == "with":
                computed += (sum(evaluation.cpu_times()[:2]) - before) / (time.perf_counter() - since) / rounds
    for process in processes.values():
        process.kill()
        process.wait()
    on, off = (np.array(took[side]) for side in SIDES)  # (rounds, steps), seconds
    draws = np.random.default_rng(0).integers(rounds, size=(1000, rounds))
    found = {
        "with_step_seconds": np.median(on, 0).mean(),
        "without_step_seconds": np.median(off, 0).mean(),
        "cost": overhead_of(on, off),
        "standard_error": np.std([overhead_of(on[draw], off[draw]) for draw in draws]),
        "evaluation_on_its_core": computed,
    }
    found = {name: round(float(value), 4) for name, value in found.items()}
    print(json.dumps({"benchmark": "evaluating", "rounds": rounds, "steps_of_a_round": steps, **found, "bar": BAR}))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=count, default=20)
    parser.add_argument("--steps", type=count, default=10, help="of a round")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("overrides", type=override, nargs="*", help="of both runs: KEY=VALUE")
    arguments = parser.parse_args()
    for given in arguments.overrides:
        if given.startswith(OURS):
            parser.error(f"{given}: {given.partition('=')[0]}: this benchmark sets it: leave it out")
    if not DATA.is_dir():
        parser.error(f"{DATA}: no such dataset: python main.py prepare configs/data/demo.yaml")
    if not arguments.serve:
        compare(arguments.rounds, arguments.steps, arguments.overrides)
        return
    torch.manual_seed(0)
    total = (arguments.rounds + 1) * arguments.steps + 10
    serve(arguments.serve, total, arguments.steps, [MODELS["10x384"][0], *arguments.overrides])


if __name__ == "__main__":
    main()
