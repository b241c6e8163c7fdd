"""For a run file's `imports`: a callback that ends its process by SIGKILL, once for each step it is given.

`callbacks: [{name: killer, steps: [2, 5], event: batch_end}]` kills at that event of step 2 and, when the run has come
back, of step 5. RUN/killed-N says that it did.
"""

import os
import signal
from pathlib import Path
from typing import Any, Literal

from composer.core import Callback, Event, State
from composer.loggers import Logger
from pydantic import Field

from flexbert_core.schema import Component
from recipe.slots import CALLBACKS


@CALLBACKS.register("killer")
class Killer(Callback):
    class Config(Component):
        steps: list[int] = Field(description="1-based")
        event: Literal["batch_start", "after_backward", "batch_end"] = Field("batch_end", description="of Composer")

    def __init__(self, config: Config, *, plan: Any, folder: Path) -> None:
        self.config, self.folder = config, folder

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value + (event is not Event.BATCH_END)  # counted up before the step's end
        mark = self.folder / f"killed-{step}"
        if event.value == self.config.event and step in self.config.steps and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
