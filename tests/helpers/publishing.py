"""A run to publish, and pushes in processes that can be killed at any moment: forked from one that has imported all."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.runs import ROOT, environment
from tests.helpers.tiny import ROW, ROWS, write_config

PER_STEP = ROWS * ROW
EXPORTS = [
    "tokens-0",
    f"tokens-{2 * PER_STEP}",
    f"tokens-{2 * PER_STEP}-ema",
    f"tokens-{3 * PER_STEP}",
    f"tokens-{3 * PER_STEP}-ema",
]


def write_run(folder: Path, data: Path, **changes: Any) -> Path:
    """The run file of one with EXPORTS: of step 0, of a checkpoint kept for ever, of the end, and of averages."""
    checkpoint = {"keep_every": 2 * PER_STEP, "exports": "permanent"}
    return write_config(folder, data, 3, checkpoint=checkpoint, ema={"decay": 0.9}, **changes)


class Pushes:
    """Starts `main.py publish ...` in forks; close it. variables: of their environment."""

    def __init__(self, variables: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.publishing"],
            cwd=ROOT,
            env=environment() | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def push(
        self, *arguments: str, kill_after: float | None = None, started: Callable[[int], None] = lambda pid: None
    ) -> tuple[int, str]:
        """`main.py publish ARGUMENTS`: its exit code (-9: it was killed, after so many seconds) and what it said.
        started: called with its process id."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([arguments, kill_after]) + "\n")
        self._process.stdin.flush()
        started(int(self._process.stdout.readline()))
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        code, text = json.loads(self._process.stdout.readline())
        return code, text

    def close(self) -> None:
        self._process.communicate("")


def _serve() -> None:
    import huggingface_hub.hf_api
    import matplotlib.pyplot

    import commands.publish
    import evals.publishing.hub
    import evals.publishing.push
    import main
    import training.trainer

    for module in (huggingface_hub, matplotlib, commands, evals, training):
        assert module
    for line in sys.stdin:
        arguments, kill_after = json.loads(line)
        log = Path(f"/proc/{os.getpid()}/fd/{os.memfd_create('log')}")
        go, tell = os.pipe()
        child = os.fork()
        if not child:
            os.read(go, 1)
            _push(main.app, arguments, log)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        sys.stdin.readline()
        os.write(tell, b"x")
        os.close(go)
        os.close(tell)
        status = None
        if kill_after is not None:
            end = time.monotonic() + kill_after
            while time.monotonic() < end and status is None:
                time.sleep(0.001)
                done, found = os.waitpid(child, os.WNOHANG)
                status = found if done else None
            if status is None:
                os.kill(child, signal.SIGKILL)
        if status is None:
            status = os.waitpid(child, 0)[1]
        sys.stdout.write(json.dumps([os.waitstatus_to_exitcode(status), log.read_text()]) + "\n")
        sys.stdout.flush()
        os.close(int(log.name))


def _push(app: Any, arguments: list[str], log: Path) -> None:
    code = 70
    try:
        with log.open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        signal.alarm(120)
        app(["publish", *arguments])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
