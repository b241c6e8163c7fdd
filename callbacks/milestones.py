"""What happens between steps: evaluation, checkpoints, exports, in this order, each when it is due."""

from collections.abc import Callable

from composer.core import Callback, State
from composer.loggers import Logger


class BetweenSteps(Callback):
    """Runs `actions` after a step, in order. An action is (due(step), run(step)); step counts finished steps.

    Evaluation comes before the checkpoint (a kill between them repeats it), the export after it. A restart that finds
    itself on a step whose evaluation or export is not there makes it first, see `fit_start`.
    """

    def __init__(
        self,
        actions: list[tuple[Callable[[int], bool], Callable[[int], None]]],
        on_resume: Callable[[int], None],
        after: Callable[[], None],
        leave: Callable[[int], bool],
    ) -> None:
        """on_resume: called with the step at which fit starts. after: called when any action ran. leave: called first
        after each step; True ends the fit here, without the actions."""
        self.actions, self.on_resume, self.after, self.leave = actions, on_resume, after, leave

    def fit_start(self, state: State, logger: Logger) -> None:
        self.on_resume(state.timestamp.batch.value)

    def batch_end(self, state: State, logger: Logger) -> None:
        step, acted = state.timestamp.batch.value, False
        if self.leave(step):
            state.stop_training()
            return
        for is_due, run in self.actions:
            if is_due(step):
                run(step)
                acted = True
        if acted:
            self.after()
