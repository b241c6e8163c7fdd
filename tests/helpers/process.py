"""Where a process of ours runs, with what environment."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "main.py"), *arguments]


def environment() -> dict[str, str]:
    """One thread per process, so that sums have one order; no launcher's variables."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RANK", "WORLD_SIZE", "LOCAL_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "10000"}
