"""The three-phase recipe at 20M tokens (configs/replica.yaml): run straight, and interrupted in every phase.

`python -m benchmarks.replica [FOLDER] [KEY=VALUE ...]` prints JSON lines; FOLDER (default runs/replica-benchmark) keeps
both runs, so that the same command goes on where it was stopped. The interrupted run is stopped once in each phase, by
turns with SIGTERM and SIGKILL, and goes on with another number of processes: 1, then 2, then 1 again. Sums over two
processes are rounded otherwise than over one, so the two runs agree to rounding, not to the bit; `noise` says how much
rounding alone does: the same comparison for a third run, straight, with microbatches of half the rows.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.arguments import override, parser_of

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "replica.yaml"
# Share of the run's tokens at which it is stopped, how, and the processes that go on behind it. One in each phase.
STOPS = [(0.4, signal.SIGTERM, 2), (0.92, signal.SIGKILL, 1), (0.985, signal.SIGTERM, 1)]


def command(processes: int, runs: Path, overrides: list[str]) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher = [str(Path(sys.executable).parent / "composer"), "-n", str(processes)]
    return [*launcher, str(ROOT / "main.py"), "train", str(CONFIG), f"runs={runs}", *overrides]


def lines(run: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def tokens_done(run: Path) -> int:
    return max((line["tokens"] for line in lines(run)), default=0)


def straight(runs: Path, overrides: list[str]) -> dict[str, Any]:
    """Train to the end; the summary."""
    subprocess.run(command(1, runs, overrides), cwd=ROOT, check=True)
    return json.loads((runs / "replica" / "summary.json").read_text())


def interrupted(runs: Path, overrides: list[str], total: int) -> dict[str, Any]:
    """The same with the stops; the summary."""
    run = runs / "replica"
    processes = 1
    for share, number, after in STOPS:
        if tokens_done(run) < share * total:
            process = subprocess.Popen(command(processes, runs, overrides), cwd=ROOT, start_new_session=True)
            while process.poll() is None and tokens_done(run) < share * total:
                time.sleep(0.2)
            assert process.poll() is None, f"the run ended before it could be stopped, with {process.poll()}"
            _stop(process, number)
            said = {"stopped_by": number.name, "after_tokens": tokens_done(run), "processes": processes}
            print(json.dumps({"benchmark": "replica", **said, "exit_code": process.wait()}), flush=True)
        processes = after
    subprocess.run(command(processes, runs, overrides), cwd=ROOT, check=True)
    return json.loads((run / "summary.json").read_text())


def _stop(process: "subprocess.Popen[Any]", number: signal.Signals) -> None:
    """SIGKILL takes the launcher and all ranks at once; SIGTERM goes to the process that was started."""
    if number is signal.SIGKILL:
        import os

        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.wait()


def compare(what: str, here: dict[str, Any], there: dict[str, Any], runs: tuple[Path, Path]) -> None:
    """Print how far two runs are from each other."""
    losses = [{line["step"]: line["loss"] for line in lines(run / "replica") if "loss" in line} for run in runs]
    steps = losses[0].keys() & losses[1].keys()
    found = {
        "steps": len(steps),
        "same_steps": losses[0].keys() == losses[1].keys(),
        "same_data": here["streams"] == there["streams"],
        "largest_relative_difference_of_step_losses": max(abs(losses[0][step] / losses[1][step] - 1) for step in steps),
        "final_validation_loss": [here["validation"]["loss"], there["validation"]["loss"]],
        "final_masked_accuracy": [here["validation"]["masked_accuracy"], there["validation"]["masked_accuracy"]],
    }
    print(json.dumps({"benchmark": "replica", "compared": what, **found}), flush=True)


def main(folder: Path, overrides: list[str]) -> None:
    """Runs that are finished in FOLDER are not run again."""
    plain = straight(folder / "straight", overrides)
    total = max(line["tokens"] for line in lines(folder / "straight" / "replica"))
    seconds = {"train_seconds": round(plain["train_seconds"]), "tokens_per_second": round(plain["tokens_per_second"])}
    print(json.dumps({"benchmark": "replica", "tokens": plain["tokens"], "slots": total, **seconds}), flush=True)
    stopped = interrupted(folder / "interrupted", overrides, total)
    compare("interrupted", stopped, plain, (folder / "interrupted", folder / "straight"))
    other = straight(folder / "noise", [*overrides, "trainer.microbatch_size=4"])
    compare("noise", other, plain, (folder / "noise", folder / "straight"))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    folder = arguments.pop(0) if arguments and "=" not in arguments[0] and not arguments[0].startswith("-") else None
    parser = parser_of(__doc__)
    parser.usage = "%(prog)s [FOLDER] [KEY=VALUE ...]"
    parser.add_argument("overrides", type=override, nargs="*", metavar="KEY=VALUE")
    main(Path(folder or "runs/replica-benchmark").absolute(), parser.parse_args(arguments).overrides)
