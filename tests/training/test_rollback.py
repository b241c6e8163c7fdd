"""After a rollback figures are those of the steps that the run has, and its time is that of all that it computed."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from callbacks.clock import Clock
from callbacks.ledger import Ledger
from callbacks.step_log import read_lines
from callbacks.watchdog import Watchdog
from recipe.config import load_run_config
from recipe.cost import phase_flops_per_token
from recipe.phases import PhasePlan
from tests.helpers.in_process import PER_STEP
from tests.helpers.tiny import ROW, ROWS, write_config
from training.run import Run

FIRST, LAST, EVERY = 4, 24, 10
SHAPE = {"max_seq_len": ROW, "global_batch_size": ROWS, "lr": 1e-4}  # so low that the loss goes up as often as down
PHASES = [
    {"name": "first", "tokens": FIRST * PER_STEP, **SHAPE},
    {"name": "second", "tokens": (LAST - FIRST) * PER_STEP},
]


def test_operations_and_seconds_after_a_rollback(tiny_data: Path, tmp_path: Path) -> None:
    """It goes back to step 4, the border of the phases. The next line, of step 10, speaks of what followed, but for the
    skipped steps."""
    trainer = {"log_interval": EVERY, "spike_guard": {"sigmas": 0.1, "window": 8, "skip": 2}}
    changes = {"phases": PHASES, "checkpoint": {"interval": 10**9}, "trainer": trainer}
    config = load_run_config(write_config(tmp_path, tiny_data, 1, "full", **changes))
    with Watchdog(config.trainer.hang_timeout) as watchdog:
        run = Run(config, Console(quiet=True), watchdog)
        try:
            run.open()
            run.fit(run.resume())
            assert run.seconds == pytest.approx(time.monotonic() - run.started, abs=0.1)
        finally:
            run.close()
    skipped = [step for steps in run.ledger.skips() for step in steps]
    assert skipped
    lines = {line["step"]: line for line in read_lines(config.folder / "metrics.jsonl") if "loss" in line}
    a_step = phase_flops_per_token(config, run.plan.phases[1]) * PER_STEP
    for step, before in ((EVERY, FIRST), (2 * EVERY, EVERY)):
        seconds = (step - before) * PER_STEP / lines[step]["slots_per_second"]
        computed = sum(before < number <= step and number not in skipped for number in range(1, LAST + 1))
        assert lines[step]["flops_per_second"] * seconds / a_step == pytest.approx(computed, rel=0.05)


def test_a_window_begins_where_training_does(tiny_data: Path, tmp_path: Path) -> None:
    """Not with the steps before a rollback, nor with what the loader was waited for in them."""
    plan = PhasePlan(load_run_config(write_config(tmp_path, tiny_data, 4)))
    clock, logger = Clock(2, Ledger(tmp_path / "ledger.jsonl", []), plan), SimpleNamespace()

    def step(number: int, wait: float = 0.0) -> None:
        state: Any = SimpleNamespace(timestamp=SimpleNamespace(batch=SimpleNamespace(value=number)))
        if number == 0:
            clock.fit_start(state, logger)  # pyright: ignore[reportArgumentType]
            return
        clock.before_dataloader(state, logger)  # pyright: ignore[reportArgumentType]
        time.sleep(wait)
        clock.after_dataloader(state, logger)  # pyright: ignore[reportArgumentType]
        clock.batch_end(state, logger)  # pyright: ignore[reportArgumentType]

    step(0)
    step(1, wait=0.3)
    for number in (0, 1, 2):
        step(number)
    assert clock.window is not None
    assert clock.window.wait_seconds <= clock.window.seconds < 0.2
    assert clock.train_seconds > 0.3
