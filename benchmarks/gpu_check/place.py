"""Where a section's checks run, how long they may take, and how their lines look."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Line = dict[str, Any]
"""`check`, `verdict` (PASS, FAIL, SKIP, INFO), and what was found."""


@dataclass(frozen=True)
class Place:
    """A device and a folder. small: toy sizes, for a CPU. until: time.monotonic() by which the section must be done."""

    device: str
    folder: Path
    small: bool = False
    until: float = float("inf")

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def settle(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], repeats: int = 5, inner: int = 1) -> float:
        """Median time of one call, of `repeats` measurements of `inner` calls each. The caller has warmed it up."""
        took = []
        for _ in range(repeats):
            self.settle()
            start = time.perf_counter()
            for _ in range(inner):
                call()
            self.settle()
            took.append((time.perf_counter() - start) / inner)
        return statistics.median(took)

    def peak_megabytes(self, call: Callable[[], Any]) -> int | None:
        """How much memory a call needs beside what is held already; None on a CPU."""
        if not self.on_gpu:
            call()
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.settle()
        return (torch.cuda.max_memory_allocated() - before) >> 20


def told(check: str, good: bool | None = None, **facts: Any) -> Line:
    """good: None where nothing is judged."""
    return {"check": check, "verdict": "INFO" if good is None else "PASS" if good else "FAIL", **facts}


def skipped(check: str, why: str) -> Line:
    """A check that this machine has no package or no time for."""
    return {"check": check, "verdict": "SKIP", "why": why}


def failed(check: str, error: BaseException) -> Line:
    """A check that raised."""
    text = (str(error).strip().splitlines() or [""])[0]
    return {"check": check, "verdict": "FAIL", "error": f"{type(error).__name__}: {text}"[:500]}
