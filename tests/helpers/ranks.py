"""Many small runs in real processes, quickly: one process imports everything, every rank of every run is forked from it.

The ranks find each other over gloo by the variables that a launcher sets; the launchers have tests of their own.
"""

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.helpers.process import ROOT, command, environment, quicken_runs

_SECONDS = 300
# Variables that are read when a command needs them, and those that imports and runs in this process set by themselves.
# The server has imported all, with any other as it was then.
_READ_LATE = ("AWS_", "FAKE_", "PYTEST_", "RAY_")
_SET_BY_US = ("DATATROVE_", "KMP_", "NCCL_ALGO", "OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM", "TORCHINDUCTOR_")


class Ranks:
    """Starts ranks."""

    def __init__(self) -> None:
        self._variables = environment(before_tests=True)
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

    def train(self, world_size: int, *arguments: str, extra: dict[str, str] | None = None) -> str:
        """`main.py train ARGUMENTS`, which must succeed on all ranks."""
        codes, text = self.run(world_size, "train", *arguments, extra=extra)
        assert codes == [0] * world_size, text
        return text

    def can_have(self, variables: dict[str, str]) -> bool:
        """Whether a process with this environment would have imported what the server has."""
        differ = {name for name, _ in self._variables.items() ^ variables.items()}
        return all(name.startswith(_READ_LATE + _SET_BY_US) for name in differ)

    def command(
        self, arguments: Sequence[str], variables: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """`main.py ARGUMENTS` in one process that has this environment, as subprocess.run would run it."""
        (code,), (output, errors) = self._ask(1, arguments, variables, timeout, files=2)
        if code == -signal.SIGALRM:
            raise subprocess.TimeoutExpired(command(*arguments), timeout, output, errors)
        return subprocess.CompletedProcess(command(*arguments), code, output, errors)

    def start(self, *arguments: str) -> "Forked":
        """The same, but it is left running, in a session of its own."""
        return Forked(self, *self.ask("start", arguments, self._variables, _SECONDS))

    def _ask(
        self, world_size: int, arguments: Sequence[str], variables: dict[str, str], seconds: float, *, files: int
    ) -> tuple[list[int], list[str]]:
        """files: 1 when stdout and stderr go to one, 2 when each has its own."""
        return self.ask("run", world_size, arguments, variables, seconds, files)

    def ask(self, what: str, *arguments: Any) -> Any:
        """The server's answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._one_at_a_time:
            self._process.stdin.write(json.dumps([what, *arguments]) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

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


class Forked:
    """A command that runs, as subprocess.Popen has it."""

    def __init__(self, ranks: Ranks, pid: int, errors: str) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ranks, self._errors = ranks, Path(errors)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._ranks.ask("poll", self.pid)
        return self.returncode

    def wait(self, timeout: float = _SECONDS) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("train", timeout)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def errors(self) -> str:
        """What it wrote to stderr, so far."""
        return self._errors.read_text()


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
    """What each fork would do anew: the imports of all commands, and what is slow when it is first called."""
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
    spans = Spans(np.arange(3), np.zeros(3, np.int64), np.full(3, 8))
    pack(spans, 16, np.random.default_rng(0), np.arange(3) % 2)  # numba loads what it has compiled
    warnings.filterwarnings("error", module=our_modules())
    quicken_runs()
    cpuinfo.get_cpu_info()


def _serve() -> None:
    warm_up()
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        sys.stdout.write(json.dumps({"run": _run, "start": _start, "poll": _poll}[what](*arguments)) + "\n")
        sys.stdout.flush()


def _run(
    world_size: int, arguments: list[str], variables: dict[str, str], seconds: float, files: int
) -> tuple[list[int], list[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [_log() for _ in range(files)]
    ranks = list[int]()
    for rank in range(world_size):
        numbers: dict[str, Any] = {}
        if world_size > 1:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            numbers |= {"NODE_RANK": 0, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
        each = {**variables, **{name: str(value) for name, value in numbers.items()}}
        ranks.append(_fork(arguments, each, seconds, logs))
    codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    texts = [log.read_text() for log in logs]
    for log in logs:
        os.close(int(log.name))
    return codes, texts


def _start(arguments: list[str], variables: dict[str, str], seconds: float) -> tuple[int, str]:
    """Its logs stay open: what they hold is small."""
    logs = [_log(), _log()]
    return _fork(arguments, variables, seconds, logs, session=True), str(logs[1])


def _poll(child: int) -> int | None:
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def _log() -> Path:
    return Path(f"/proc/{os.getpid()}/fd/{os.memfd_create('log')}")


def _fork(
    arguments: list[str], variables: dict[str, str], seconds: float, logs: list[Path], *, session: bool = False
) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if session:
            os.setsid()
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
