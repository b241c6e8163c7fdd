"""Where a process of ours runs, with what environment; what makes many runs in one process quick."""

import functools
import gc
import os
import sys
from pathlib import Path

import cpuinfo

ROOT = Path(__file__).parent.parent.parent
COUNTING = str(ROOT / "tests" / "helpers" / "counting.py")  # a run file's `imports`: what is compiled, with COUNTS

OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "NODE_RANK", "MASTER_")

BEFORE_TESTS: dict[str, str] = {}  # variables of the environment, since the tests' modules are imported


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "main.py"), *arguments]


def environment(*, before_tests: bool = False) -> dict[str, str]:
    """One thread per process, so that sums have one order; no launcher's variables. before_tests: without what the
    test of the moment has set."""
    variables = BEFORE_TESTS if before_tests else os.environ
    kept = {key: value for key, value in variables.items() if not key.startswith(OF_LAUNCHERS)}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "10000"}


def quicken_runs() -> None:
    """Two of the three seconds of a tiny run are Composer's: it asks for the CPU's name, by processes of a second, and
    collects garbage, among all that was imported."""
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    gc.collect()
    gc.freeze()
