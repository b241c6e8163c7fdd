"""Many small runs in real processes, quickly: one process imports everything, every rank of every run is forked from it.

The ranks find each other over gloo by the variables that a launcher sets; the launchers have tests of their own.
"""

import atexit
import functools
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import tomllib
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.helpers.process import ROOT, command, environment

_SECONDS = 300
# Variables that are read when a command needs them. The server has imported all, with any other as it was then.
_READ_LATE = ("AWS_", "FAKE_", "PYTEST_")


class Ranks:
    """Starts ranks."""

    def __init__(self) -> None:
        self._variables = environment()
        self._one_at_a_time = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.ranks"],
            cwd=ROOT,
            env=self._variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        """Of the process whose children are the ranks."""
        return self._process.pid

    def run(self, world_size: int, *arguments: str, extra: dict[str, str] | None = None) -> tuple[list[int], str]:
        """`main.py ARGUMENTS` on so many ranks: their exit codes, and all that they printed. extra: variables of the
        environment."""
        codes, (text,) = self._ask(world_size, arguments, self._variables | (extra or {}), _SECONDS, files=1)
        return codes, text

    def train(self, world_size: int, *arguments: str) -> str:
        """`main.py train ARGUMENTS`, which must succeed on all ranks."""
        codes, text = self.run(world_size, "train", *arguments)
        assert codes == [0] * world_size, text
        return text

    def can_have(self, variables: dict[str, str]) -> bool:
        """Whether a process with this environment would have imported what the server has."""
        differ = {name for name, _ in self._variables.items() ^ variables.items()}
        return all(name.startswith(_READ_LATE) for name in differ)

    def command(
        self, arguments: Sequence[str], variables: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """`main.py ARGUMENTS` in one process that has this environment, as subprocess.run would run it."""
        (code,), (output, errors) = self._ask(1, arguments, variables, timeout, files=2)
        if code == -signal.SIGALRM:
            raise subprocess.TimeoutExpired(command(*arguments), timeout, output, errors)
        return subprocess.CompletedProcess(command(*arguments), code, output, errors)

    def _ask(
        self, world_size: int, arguments: Sequence[str], variables: dict[str, str], seconds: float, *, files: int
    ) -> tuple[list[int], list[str]]:
        """files: 1 when stdout and stderr go to one, 2 when each has its own."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._one_at_a_time:
            self._process.stdin.write(json.dumps([world_size, list(arguments), variables, seconds, files]) + "\n")
            self._process.stdin.flush()
            codes, texts = json.loads(self._process.stdout.readline())
        return codes, texts

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:  # a fork of the tests' process still holds the other end of its stdin
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@functools.cache
def shared_ranks() -> Ranks:
    """Those of this process's tests. They end with it."""
    ranks = Ranks()
    atexit.register(ranks.close)
    return ranks


def our_modules() -> str:
    """The pattern of the modules whose warnings are errors, from pyproject.toml."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    return options["filterwarnings"][-1].removeprefix("error:::")


def warm_up() -> None:
    """What each fork would do anew: the imports of all commands, and what is slow when it is first called.

    Of a tiny run's three seconds two went into these.
    """
    import cpuinfo
    import matplotlib.pyplot
    import numpy as np
    from composer.algorithms import GradientClipping
    from composer.loggers import TensorboardLogger
    from transformers import ModernBertForMaskedLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    import flexbert.hf.verify
    import main
    import training.trainer
    from data.feed.packing import Spans, pack

    del flexbert, training, matplotlib, main
    loaded = (GradientClipping, TensorboardLogger, ModernBertForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING)
    assert all(loaded)
    info = cpuinfo.get_cpu_info()  # starts processes; Composer asks for it at each start, and does not use it
    cpuinfo.get_cpu_info = lambda: info
    spans = Spans(np.arange(3), np.zeros(3, np.int64), np.full(3, 8))
    pack(spans, 16, np.random.default_rng(0), np.arange(3) % 2)  # numba loads what it has compiled
    warnings.filterwarnings("error", module=our_modules())
    gc.collect()
    gc.freeze()  # a run's own collections then leave all this alone


def _serve() -> None:
    warm_up()
    for line in sys.stdin:
        world_size, arguments, variables, seconds, files = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        logs = [Path(f"/proc/{os.getpid()}/fd/{os.memfd_create('log')}") for _ in range(files)]
        ranks = list[int]()
        for rank in range(world_size):
            numbers: dict[str, Any] = {}
            if world_size > 1:
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
                numbers |= {"NODE_RANK": 0, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
            each = {**variables, **{name: str(value) for name, value in numbers.items()}}
            ranks.append(_fork(arguments, each, seconds, logs))
        codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
        sys.stdout.write(json.dumps([codes, [log.read_text() for log in logs]]) + "\n")
        sys.stdout.flush()
        for log in logs:
            os.close(int(log.name))


def _fork(arguments: list[str], variables: dict[str, str], seconds: float, logs: list[Path]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for number, log in ((0, Path(os.devnull)), (1, logs[0]), (2, logs[-1])):
            file = os.open(log, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
            os.dup2(file, number)
            os.close(file)
        os.environ.clear()
        os.environ.update(variables)
        signal.alarm(int(seconds))
        sys.argv = command(*arguments)[1:]
        sys.modules["main"].app(arguments)
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
