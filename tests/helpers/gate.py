"""For a run file's `imports`: a callback that holds a run before a step until the test has seen it there.

`callbacks: [{name: gate, step: 5}]` writes RUN/waiting (its rank's process id) before step 5 and goes on when there is
RUN/go. So a test acts on a run that is at a known place, on a machine of any speed.
"""

import os
import time
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from pydantic import Field

from flexbert_core.schema import Component
from recipe.slots import CALLBACKS

WAITING, GO = "waiting", "go"


@CALLBACKS.register("gate")
class Gate(Callback):
    class Config(Component):
        step: int = Field(ge=1, description="1-based")

    def __init__(self, config: Config, *, plan: Any, folder: Path) -> None:
        self.step, self.folder = config.step, folder

    def batch_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value + 1 == self.step and not (self.folder / GO).exists():
            (self.folder / f"{WAITING}-{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
            while not (self.folder / GO).exists():
                time.sleep(0.01)
