"""`evaluations: [{name: eval, files: [glue-quick]}]` of a run file: evaluations of its checkpoints, beside it.

A process of its own makes them, `main.py follow RUN --only TITLE`. It ends with this one, however that ends; the next
start of the run begins another, which makes up for what is missing.
"""

import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.loggers.wandb_logger import WandBLogger

import ranks
from callbacks.step_log import read_lines
from evals.background_config import BackgroundConfig
from evals.following import adopt, followings, mark_of, read_evaluations
from evals.packages import require
from flexbert_core.children import ends_with_parent
from recipe.config import RunConfig
from recipe.slots import EVALUATIONS
from training import signals
from training.checkpoints.files import list_checkpoints, tokens_of
from training.publisher import OF_LAUNCHERS

log = logging.getLogger(__name__)
_MAIN = Path(__file__).parent.parent / "main.py"
_LOOK_SECONDS = 0.2


@EVALUATIONS.register("eval")
class Background(Callback):
    """Evaluations of checkpoints, by the files of configs/eval, in a process of its own that never holds up a step. Its
    scores are logged with the step of their checkpoint, as evaluations/NAME/SCORE."""

    Config = BackgroundConfig

    def __init__(self, config: BackgroundConfig, *, run: RunConfig, folder: Path, **_: Any) -> None:
        """folder: runs/NAME. Raises ConfigError for evaluations that are none, that another entry names, too,
        or that need packages which are not here."""
        self._everyone = followings(folder, run)
        self.following = next(each for each in self._everyone if each.entry == config)
        for name, loaded in self.following.load().items():
            require(name, loaded[0].evaluation.packages())
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = 0  # steps that were done when training began, or began again after a rollback
        self._marks: dict[int, str | None] = {}  # by step, of the weights that this history of the run has there
        self._logged: set[tuple[int, str]] = set()
        self._warned: set[tuple[int, str]] = set()
        self._size = 0  # of evaluations.jsonl when all that is logged by now was in it
        self._old = 0  # its lines of earlier processes, whose failures are tried again
        self._said_end = False

    def run(self, model: Any, step: int) -> Mapping[str, Any]:
        """No scores: those of this step come when they are there."""
        return {}

    def fit_start(self, state: State, logger: Logger) -> None:
        """Of each start of training: after a rollback there are some in one process."""
        if ranks.rank() == 0:
            self._begin(state.timestamp.batch.value)

    def _begin(self, step: int) -> None:
        """Follow the run from after this step."""
        self._stop()
        following, self._begun = self.following, step
        lines = read_lines(following.run / "metrics.jsonl")
        found = {(line["step"], name) for line in lines for name in line.get("evaluations", {})}
        self._logged = {(step, name) for step, name in found if name in following.files}
        self._warned, self._size, self._said_end = set(), 0, False
        tokens = following.plan.tokens_before(step)
        try:
            adopt(following.run, self._everyone, up_to=tokens)
            following.pin_all(up_to=tokens)
            there = (*list_checkpoints(following.run / "checkpoints"), *following.waiting())
            self._marks = {}
            for path in there:
                if tokens_of(path) <= tokens and (at := following.plan.step_of(tokens_of(path))) is not None:
                    self._marks[at] = mark_of(path)
            self._old = len(list(read_evaluations(following.run)))
            self._start()
        except OSError as error:  # no reason to end a run
            log.warning("%s: no evaluations, training goes on: %s", following.run, error)

    def _start(self) -> None:
        config, following = self.following.entry, self.following
        kept = {key: value for key, value in os.environ.items() if not key.startswith(OF_LAUNCHERS)}
        threads = str(config.threads)
        environment = {**kept, "CUDA_VISIBLE_DEVICES": ",".join(config.gpus), "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
        end_with_us = ends_with_parent(signal.SIGKILL)

        def before() -> None:
            end_with_us()
            os.nice(19)

        with following.log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, str(_MAIN), "follow", str(following.run), "--watch", "--only", following.title],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=before,
            )

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # of its session: its workers, too
            process.wait()

    def written(self, path: Path) -> None:
        """Of a whole checkpoint: let it wait if it is due, before retention removes it. On the saver's thread."""
        step = self.following.plan.step_of(tokens_of(path))
        if step is not None:
            self._marks[step] = mark_of(path)
        try:
            self.following.pin(path)
        except OSError as error:  # no reason to end a run
            log.warning("%s: cannot wait for its evaluation, which is left out: %s", path, error)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._process is None:
            return
        self._collect(logger, state.timestamp.batch.value)
        if self._process.poll() is not None:
            self._say_end(", training goes on")

    def _collect(self, logger: Logger, step: int | None) -> None:
        """Log what is new. step: that ends just now. The score of the one before it waits for the next time: loggers
        take what is logged of that step now for something of the step that ends."""
        file = self.following.lines
        size = file.stat().st_size if file.exists() else 0
        if size == self._size:
            return
        put_off = False
        for number, line in self._of_this_history():
            key = (line["step"], line["evaluation"])
            if key in self._logged:
                continue
            if "scores" not in line:
                if key not in self._warned and number >= self._old:
                    self._warned.add(key)
                    log.warning("evaluation %s of tokens-%d: %s", line["evaluation"], line["tokens"], line["failed"])
            elif step is not None and line["step"] == step - 1:
                put_off = True
            else:
                self._logged.add(key)
                self._log(logger, line)
        if not put_off:
            self._size = size

    def _of_this_history(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Numbers and lines of evaluations.jsonl: the newest of each evaluation and step, but for weights that a
        rollback gave up."""
        newest: dict[tuple[int, str], tuple[int, Mapping[str, Any]]] = {}
        for number, line in enumerate(read_evaluations(self.following.run)):
            step, name = line["step"], line["evaluation"]
            # Of a step before the start whose checkpoint is gone no other weights came later.
            ours = line.get("weights") == self._marks[step] if step in self._marks else step <= self._begun
            if name in self.following.files and ours:
                newest[step, name] = number, line
        yield from newest.values()

    def _log(self, logger: Logger, line: Mapping[str, Any]) -> None:
        prefix = f"evaluations/{line['evaluation']}/"
        metrics = {prefix + name: score for name, score in line["scores"].items() if math.isfinite(score)}
        for destination in logger.destinations:
            if isinstance(destination, WandBLogger):  # takes no step before its newest
                destination.log_metrics({**metrics, f"{prefix}tokens": line["tokens"]})
            else:
                destination.log_metrics(metrics, line["step"])

    def finish(self, logger: Logger) -> None:
        """After the run's last checkpoint and summary: wait for what is left.

        Raises SystemExit(EXIT_PREEMPTED) when a signal ends the waiting: the same command makes up for what is missing.
        """
        if ranks.rank() != 0:
            return
        if self._process is None:  # the steps were done before this process started
            self._begin(self.following.plan.total_steps)
        if self._process is None:
            return
        while (code := self._process.poll()) is None:
            if signals.received():
                self._stop()
                log.warning(
                    "%s: the run is finished, its evaluations (%s) are not: the same command goes on with them, and so "
                    "does `main.py follow %s`",
                    self.following.run,
                    self.following.title,
                    self.following.run,
                )
                raise SystemExit(signals.EXIT_PREEMPTED)
            self._collect(logger, None)
            time.sleep(_LOOK_SECONDS)
        self._collect(logger, None)
        if code != 0 and not (code == 1 and self._warned):  # 1: evaluations failed, which was said of each
            self._say_end("")

    def _say_end(self, and_now: str) -> None:
        """That the process is gone, once: nothing else would tell."""
        if self._said_end or self._process is None:
            return
        self._said_end = True
        said = self.following.log.read_text(errors="replace") if self.following.log.exists() else ""
        log.warning(
            "EVALUATIONS ENDED (exit code %d)%s: %s (more in %s; mend it, then `main.py follow %s` or the next start "
            "makes up for it)",
            self._process.returncode,
            and_now,
            next((line.removeprefix("error: ") for line in reversed(said.split("\n")) if line.strip()), "no output"),
            self.following.log,
            self.following.run,
        )

    def close(self, state: State, logger: Logger) -> None:
        self._stop()
