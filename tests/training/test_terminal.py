"""A terminal that is closed under a run: it finishes its step, saves and ends, and under nohup it goes on."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.process import ROOT, environment

# Stands for a rank: it says a line after each step, and saves when it was asked to stop.
RANK = """
import sys, time
from training import signals
file = sys.argv[1]
with signals.from_start_up():
    signals.finish_steps()
    print("trains", flush=True)
    end = time.monotonic() + (30 if sys.argv[2] == "stops" else 1)
    while not signals.received() and time.monotonic() < end:
        time.sleep(0.01)
    print("saves", flush=True)
    open(file, "w").write(str(signals.received()))
"""


@pytest.mark.parametrize(("before", "way"), [(signal.SIG_DFL, "stops"), (signal.SIG_IGN, "goes on")])
def test_a_terminal_that_is_closed(tmp_path: Path, before: signal.Handlers, way: str) -> None:
    """before: nohup ignores the signal."""
    ours, terminal = pty.openpty()

    def lead() -> None:
        """A session of the terminal, which then sends SIGHUP to its leader."""
        os.setsid()
        os.close(os.open(os.ttyname(2), os.O_RDWR))
        signal.signal(signal.SIGHUP, before)

    out = tmp_path / "out"
    with out.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path / "saved"), way], cwd=ROOT, env=environment(),
            stdin=subprocess.DEVNULL, stdout=terminal if way == "stops" else file, stderr=terminal, preexec_fn=lead,
        )  # fmt: skip
    os.close(terminal)
    if way == "stops":
        assert os.read(ours, 100).startswith(b"trains")
    while way != "stops" and not out.read_bytes():
        assert process.poll() is None
        time.sleep(0.02)
    os.close(ours)
    assert process.wait(60) == 0
    assert (tmp_path / "saved").read_text() == str(way == "stops")
