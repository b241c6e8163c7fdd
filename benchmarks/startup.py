"""How long a user waits: for --help, and from the train command to the end of the first step.

`python -m benchmarks.startup [CONFIG]` prints JSON lines; the run goes to a temporary folder. Needs the demo's data.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.arguments import parser_of


def seconds_of_help(repeats: int = 7) -> list[float]:
    """Wall-clock seconds of `main.py --help`, the first (cold) one left out."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, "main.py", "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return times[1:]


def seconds_to_first_step(config: str) -> float:
    """From the command to the line of step 1 in metrics.jsonl."""
    with tempfile.TemporaryDirectory() as runs:
        arguments = [
            sys.executable,
            "main.py",
            "train",
            config,
            f"runs={runs}",
            "name=startup",
            "trainer.log_interval=1",
        ]
        start = time.perf_counter()
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        metrics = Path(runs) / "startup" / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() is not None:
                sys.exit(f"the run ended early with exit code {process.returncode}")
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        process.kill()
        process.wait()
    return seconds


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("config", nargs="?", default="configs/demo.yaml", metavar="CONFIG")
    config = parser.parse_args().config
    times = seconds_of_help()
    print(json.dumps({"help_seconds_median": round(statistics.median(times), 3), "slowest": round(max(times), 3)}))
    firsts = [seconds_to_first_step(config) for _ in range(3)]
    print(
        json.dumps({"first_step_seconds_median": round(statistics.median(firsts), 1), "slowest": round(max(firsts), 1)})
    )


if __name__ == "__main__":
    main()
