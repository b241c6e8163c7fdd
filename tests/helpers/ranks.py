"""Many small runs in real processes, quickly: one process imports everything, every rank of every run is forked from it.

The ranks find each other over gloo by the variables that a launcher sets; the launchers have tests of their own.
"""

import json
import os
import socket
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

from tests.helpers.runs import ROOT, environment

_SECONDS = 300


class Ranks:
    """Starts ranks; close it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.ranks"],
            cwd=ROOT,
            env=environment(),
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
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([world_size, arguments, extra or {}]) + "\n")
        self._process.stdin.flush()
        codes, text = json.loads(self._process.stdout.readline())
        return codes, text

    def train(self, world_size: int, *arguments: str) -> str:
        """`main.py train ARGUMENTS`, which must succeed on all ranks."""
        codes, text = self.run(world_size, "train", *arguments)
        assert codes == [0] * world_size, text
        return text

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


def our_modules() -> str:
    """The pattern of the modules whose warnings are errors, from pyproject.toml."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    return options["filterwarnings"][-1].removeprefix("error:::")


def _serve() -> None:
    import matplotlib.pyplot
    from composer.algorithms import GradientClipping
    from composer.loggers import TensorboardLogger
    from transformers import ModernBertForMaskedLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    import flexbert.hf.verify
    import main
    import training.trainer

    del flexbert, training, matplotlib
    loaded = (GradientClipping, TensorboardLogger, ModernBertForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING)
    assert all(loaded)
    warnings.filterwarnings("error", module=our_modules())

    for line in sys.stdin:
        world_size, arguments, extra = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = Path(f"/proc/{os.getpid()}/fd/{os.memfd_create('log')}")
        ranks = [_fork(main.app, world_size, rank, port, arguments, extra, log) for rank in range(world_size)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
        sys.stdout.write(json.dumps([codes, log.read_text()]) + "\n")
        sys.stdout.flush()
        os.close(int(log.name))


def _fork(
    app: Any, world_size: int, rank: int, port: int, arguments: list[str], extra: dict[str, str], log: Path
) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with log.open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        if world_size > 1:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            numbers |= {"NODE_RANK": 0, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"})
        os.environ.update(extra)
        import signal

        signal.alarm(_SECONDS)
        app(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
