"""Slot `executor`: all tasks in this process, one after the other. Slow, and the easiest to follow in a debugger."""

from copy import deepcopy
from typing import Literal

from datatrove.executor.local import LocalPipelineExecutor

from data.preparation.executors.base import EXECUTORS, Executor, Stage, one_line
from flexbert_core.schema import Component, RunError


@EXECUTORS.register("serial")
class Serial(Executor):
    """No worker process at all."""

    class Config(Component):
        name: Literal["serial"] = "serial"

    def run(self, stage: Stage) -> None:
        """Do the tasks of the stage that are not done. datatrove marks each as done when it ends."""
        tasks, logs = len(stage.sizes), str(stage.logs)
        for rank in stage.unfinished():
            executor = LocalPipelineExecutor(deepcopy(list(stage.steps)), tasks=tasks, workers=1, logging_dir=logs)
            try:
                executor._run_for_rank(rank)
            except Exception as error:
                raise RunError(one_line(error)) from None
