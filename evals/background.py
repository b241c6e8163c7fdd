"""`evaluations: [{name: eval, files: [glue-quick]}]` of a run file: evaluations of its checkpoints, beside it.

A process of its own makes them, `main.py follow RUN`. It ends with this one, however that ends; the next start of the
run begins another, which makes up for what is missing.
"""

import ctypes
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from composer.core import Callback, State
from composer.loggers import Logger
from composer.loggers.wandb_logger import WandBLogger
from pydantic import Field

import ranks
from callbacks.step_log import read_lines
from evals.config import eval_files, load_eval_file, overrides_of
from flexbert_core.schema import Component, Count
from recipe.slots import EVALUATIONS

log = logging.getLogger(__name__)
_MAIN = Path(__file__).parent.parent / "main.py"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class BackgroundConfig(Component):
    """Options of the entry `eval`."""

    name: Literal["eval"] = "eval"
    files: list[str] = Field(min_length=1, description="evaluations of configs/eval by name, or YAML files")
    set: list[str] = Field(
        default=[], description="values as on the command line: key=value, of several files NAME.key=value"
    )
    every: Count | None = Field(
        default=None,
        gt=0,
        description="tokens between checkpoints that are evaluated, and saved for it; default: milestones only, which "
        "always are",
    )
    gpus: list[str] = Field(
        default=[], description="GPUs that the process sees, as CUDA_VISIBLE_DEVICES has them; default: none, the CPU"
    )
    threads: int = Field(default=1, ge=1, description="cores that it computes with; training has precedence")


@EVALUATIONS.register("eval")
class Background(Callback):
    """Evaluations of checkpoints, by the files of configs/eval, in a process of its own that never holds up a step. Its
    scores are logged with the step of their checkpoint, as evaluations/NAME/SCORE."""

    Config = BackgroundConfig

    def __init__(self, config: BackgroundConfig, *, folder: Path, **_: Any) -> None:
        """folder: runs/NAME. Raises ConfigError for evaluations that are none."""
        self.config, self.run_folder = config, folder
        files = eval_files(",".join(config.files))
        for name, file in files.items():
            load_eval_file(file, overrides_of(name, list(files), config.set))
        self.names = set(files)
        self._process: subprocess.Popen[bytes] | None = None
        self._read = 0  # bytes of evaluations.jsonl that are logged
        self._logged: set[tuple[int, str]] = set()
        self._warned: set[tuple[int, str]] = set()

    def run(self, model: Any, step: int) -> Mapping[str, Any]:
        """No scores: those of this step come when they are there."""
        return {}

    def fit_start(self, state: State, logger: Logger) -> None:
        if ranks.rank() != 0:
            return
        for line in read_lines(self.run_folder / "metrics.jsonl"):
            self._logged |= {(line["step"], name) for name in line.get("evaluations", {}) if name in self.names}
        from evals.following import Following

        Following(self.run_folder).pin_all()
        self._start()

    def _start(self) -> None:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(self.config.gpus)}
        threads = str(self.config.threads)
        environment |= {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        prctl = ctypes.CDLL(None, use_errno=True).prctl

        def before() -> None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            os.nice(19)

        with (self.run_folder / "evaluations.log").open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, str(_MAIN), "follow", str(self.run_folder), "--watch"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=before,
            )

    def written(self, path: Path) -> None:
        """Of a whole checkpoint: let it wait if it is due, before retention removes it."""
        from evals.following import Following

        try:
            Following(self.run_folder).pin(path)
        except OSError as error:  # no reason to end a run
            log.warning("%s: cannot wait for its evaluation: %s", path, error)

    def batch_end(self, state: State, logger: Logger) -> None:
        self._collect(logger)

    def _collect(self, logger: Logger) -> None:
        file = self.run_folder / "evaluations.jsonl"
        if ranks.rank() != 0 or not file.exists() or file.stat().st_size == self._read:
            return
        from evals.following import read_evaluations

        self._read = file.stat().st_size
        for line in read_evaluations(self.run_folder):
            key = (line["step"], line["evaluation"])
            if key in self._logged or line["evaluation"] not in self.names:
                continue
            if "failed" in line:
                if key not in self._warned:
                    self._warned.add(key)
                    log.warning("evaluation %s of tokens-%d: %s", line["evaluation"], line["tokens"], line["failed"])
                continue
            self._logged.add(key)
            self._log(logger, line)

    def _log(self, logger: Logger, line: Mapping[str, Any]) -> None:
        prefix = f"evaluations/{line['evaluation']}/"
        metrics = {prefix + name: score for name, score in line["scores"].items() if math.isfinite(score)}
        for destination in logger.destinations:
            if isinstance(destination, WandBLogger):  # takes no step before its newest
                destination.log_metrics({**metrics, f"{prefix}tokens": line["tokens"]})
            else:
                destination.log_metrics(metrics, line["step"])

    def finish(self, logger: Logger) -> None:
        """After the run's last checkpoint and summary: wait for what is left."""
        if self._process is not None:
            self._process.wait()
            self._collect(logger)

    def close(self, state: State, logger: Logger) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
