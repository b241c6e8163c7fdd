"""A real sweep of tiny runs: an arm that must be better, arms that cannot be, enough seeds to tell.

    python -m benchmarks.tiny_sweep FOLDER            # prepares text, trains, prints each verdict as a JSON line

The text is this Python's own library. Arms against the baseline: `planted` has ten times its learning rate, which is
far too low; `rounded` adds up microbatches, so that it differs by rounding alone; `reordered` sees the documents in
another order, so that it is the baseline with other luck, compared without pairs. The folder's sweep is what
benchmarks/calibration.py takes the noise of real runs from.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.arguments import count, parser_of
from sweeps.folder import read_sweep
from sweeps.statistics import Comparison, verdicts
from tests.helpers.runs import command, environment, prepare_dataset

ROW, ROWS = 128, 8
LOW, HIGH = 3e-4, 3e-3
"""Learning rates of the baseline and of the planted arm."""


def write_tiny_sweep(folder: Path, seeds: int = 6, steps: int = 60, at_once: int = 2) -> Path:
    """Prepare the text and write the sweep file. The sweep lies in FOLDER/sweep."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset = folder / "dataset"
    if not dataset.exists():
        prepare_dataset(folder)
    base: dict[str, Any] = {
        "name": "tiny",
        "runs": str(folder),
        "model": {
            "preset": "modernbert-tiny",
            "vocab_size": 512,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "intermediate_size": 64,
        },
        "data": {
            "tokenizer": str(dataset / "tokenizer"),
            "streams": {name: {"path": str(dataset / name)} for name in ("async-code", "email-code")},
            "block_documents": 10,
            "num_workers": 0,
        },
        "phases": [
            {
                "name": "all",
                "tokens": steps * ROWS * ROW,
                "max_seq_len": ROW,
                "global_batch_size": ROWS,
                "lr": LOW,
                "warmup": steps // 10 * ROWS * ROW,
            }
        ],
        "evaluation": {"interval": 10 * ROWS * ROW, "max_rows": 16},
        "loggers": [],
    }
    (folder / "base.yaml").write_text(json.dumps(base))
    node = {
        "base": "base.yaml",
        "folder": str(folder / "sweep"),
        "seeds": list(range(seeds)),
        "list": {
            "planted": {"phases.0.lr": HIGH},
            "rounded": {"trainer.microbatch_size": 3},
            "reordered": {"data.block_documents": 11},
        },
        "executor": {"name": "local", "at_once": at_once, "cores_per_job": 1, "gpus_per_job": 0},
    }
    file = folder / "sweep.yaml"
    file.write_text(json.dumps(node))
    return file


def train_tiny_sweep(file: Path) -> list[Comparison]:
    """Its verdicts, once everything is trained. Raises CalledProcessError when a run fails."""
    subprocess.run(command("sweep", str(file)), env=environment(), check=True)
    return verdicts(read_sweep(file.parent / "sweep"))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--seeds", type=count, default=6, help="default: 6")
    parser.add_argument("--steps", type=count, default=60, help="default: 60")
    arguments = parser.parse_args()
    for each in train_tiny_sweep(write_tiny_sweep(arguments.folder, arguments.seeds, arguments.steps)):
        line = {"benchmark": "tiny_sweep", "arm": each.arm, "verdict": each.verdict, "paired": each.paired}
        line |= {"difference": each.mean, "low": each.low, "high": each.high, "p": each.corrected}
        line |= {"deviation": each.deviation, "visible": each.visible}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
