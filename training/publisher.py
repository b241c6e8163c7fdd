"""Publishing beside training: rank 0 starts `main.py publish RUN` in a process of its own, and never waits for it in a
step. What a push leaves out, whatever the reason, is pushed at the next occasion."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from recipe.config import RunConfig
from training import signals

log = logging.getLogger(__name__)
_MAIN = Path(__file__).parent.parent / "main.py"
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "NODE_RANK", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC", "OMP_")
_LOOK_SECONDS = 0.1
LAST_SECONDS = 1800.0  # that a finished run waits for its last push; a job's end would kill it


class Publisher:
    """Of one run; it does nothing without `publish`, and on other ranks than 0.

    A push is a process in a session of its own: it outlives a training that is killed, and ends by itself when all
    exports are where they belong. One that fails is a warning, with the last line of RUN/publish.log.
    """

    def __init__(self, config: RunConfig, folder: Path, rank: int) -> None:
        self.wanted = config.publish is not None and rank == 0
        self.folder, self.log = folder, folder / "publish.log"
        self._process: subprocess.Popen[bytes] | None = None

    def push(self) -> None:
        """Start a push unless one is under way, which looks for new exports itself. Returns at once."""
        if not self.wanted or self._busy():
            return
        kept = {key: value for key, value in os.environ.items() if not key.startswith(OF_LAUNCHERS)}
        environment = {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(_MAIN), "publish", str(self.folder), "--background"]
        try:
            with self.log.open("ab") as out:
                self._process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
                )
        except OSError as error:
            log.warning("%s: publishing could not be started, training goes on: %s", self.folder, error)

    def finish(self, say: Callable[[str], None]) -> None:
        """Push what is missing, and wait for it: training is done. A signal that asks the run to stop ends the waiting,
        and not the push."""
        if not self.wanted:
            return
        say(f"{self.folder}: publishing what is not published yet; {self.log.name} says how it goes")
        end, last = time.monotonic() + LAST_SECONDS, not self._busy()
        self.push()
        while self._busy() or not last:
            if self._process is None:  # the one that was under way may have looked before the last export was there
                last = True
                self.push()
            if signals.received() or time.monotonic() > end:
                log.warning("%s: not all is published yet, a process of its own goes on with it", self.folder)
                return
            time.sleep(_LOOK_SECONDS)

    def _busy(self) -> bool:
        """Whether a push is under way. Says what became of the one before."""
        if self._process is None:
            return False
        code = self._process.poll()
        if code is None:
            return True
        self._process = None
        if code:
            lines = self.log.read_text(errors="replace").splitlines() or ["no output"]
            log.warning(
                "NOT ALL IS PUBLISHED, training goes on: %s (the next export tries again, and so does `main.py publish "
                "%s`)",
                lines[-1].removeprefix("error: "),
                self.folder,
            )
        return False
