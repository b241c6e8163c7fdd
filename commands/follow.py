"""What `main.py train` does of a finished run for evaluations that are missing."""

from pathlib import Path

from rich.console import Console

from evals.follower import follow
from evals.following import left_to_do


def catch_up(run: Path, console: Console) -> None:
    """Evaluate checkpoints that are due and have no scores: a kill came between, or an evaluation was added."""
    if missing := left_to_do(run):
        console.print(f"{run}: still to evaluate: {', '.join(missing)}", soft_wrap=True)
        if not follow(run, console, watch=False):
            console.print(f"warning: {run}: not all evaluations went well: see {run}/evaluations.jsonl", soft_wrap=True)
