"""Steps that must not be applied: a loss or gradient that is not finite, batches that a loss spike was traced to."""

import inspect
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor
from torch.distributed.tensor import DTensor

import ranks
from flexbert_core.schema import RunError

log = logging.getLogger(__name__)
_LOSS = "loss/train/total"


def step_loss(state: State) -> float | None:
    """The loss of the step just finished; None when the step was not applied (StepGuard's callback runs first)."""
    loss = float(state.total_loss_dict[_LOSS])
    return loss if math.isfinite(loss) else None


def predicted_loss(state: State) -> float | None:
    """The same; None also when no token of the global batch was to be predicted: its 0 is no loss of the model's."""
    # A mean of cross entropies is 0 to the last bit for no other reason.
    return step_loss(state) or None


class DivergedError(RunError):
    """Losses or gradients stayed not finite: a result of the run's config, where other RunErrors are of its machine."""


class Spike(NamedTuple):
    """A loss far above the steps before. step: 1-based, as in metrics.jsonl."""

    step: int
    loss: float
    mean: float
    sigma: float


class SpikeDetector:
    """Loss over the running mean plus k standard deviations of the last steps that were applied.

    Rule and defaults (6 sigma, 128 steps, silent until half of them are there) are those of OLMo-core's
    SkipStepOptimizer, which leaves such a step out; ours is rolled back, since a loss is high because of the updates
    before it as well. The window begins anew with every phase: rows and masking change, and the loss with them.
    """

    def __init__(self, sigmas: float, window: int) -> None:
        self.sigmas, self.window = sigmas, window
        self._losses: list[float] = []
        self._phase = ""

    def look(self, step: int, loss: float, phase: str) -> Spike | None:
        """Judge a step's loss by those before it, and remember it."""
        if phase != self._phase:
            self._losses, self._phase = [], phase
        spike = None
        if len(self._losses) >= self.window // 2:
            mean, sigma = statistics.fmean(self._losses), statistics.stdev(self._losses)
            if loss > mean + self.sigmas * sigma:
                spike = Spike(step, loss, mean, sigma)
        self._losses = [*self._losses, loss][-self.window :]
        return spike

    def state_dict(self) -> dict[str, Any]:
        """JSON values for the checkpoint."""
        return {"losses": self._losses, "phase": self._phase}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses, self._phase = list(state["losses"]), state["phase"]


class StepGuard(Callback):
    """Stands between Composer and `optimizer.step`, where loss and gradient of the global batch are there and nothing
    has changed yet. Must be the first callback: the others see by `step_loss` whether the step was applied.

    A step is applied when the loss and the gradient's norm are finite on every rank: one all-reduce and one host sync a
    step. Otherwise parameters and optimizer state stay as they are. A step to be skipped runs neither forward nor
    backward; it still counts as a step, so that the step number keeps deciding everything else.

    A step is applied once, however often Composer repeats its batch. With microbatches found by themselves it does so
    where memory ran out, which is before the update; and where memory had to be freed in two batches in a row, which it
    sees after the update. Then there is nothing left to do: the next batch comes in smaller microbatches.

    | logged | unit | event |
    |---|---|---|
    | nothing; `bad_steps`, so far, is in the lines of metrics.jsonl | | |
    """

    def __init__(
        self,
        max_bad_steps: int,
        phase_of: Callable[[int], str],
        culprit: Callable[[State], str],
        detector: SpikeDetector | None,
        left_out: Sequence[range] = (),
        works_on_shards: bool = True,
    ) -> None:
        """phase_of: name by step (0-based). culprit: names the first bad module; a collective. left_out: steps, from 1
        on, that the run file skips. works_on_shards: whether the optimizer does."""
        self.max_bad_steps, self.phase_of, self.culprit, self.detector = max_bad_steps, phase_of, culprit, detector
        self.bad_steps = 0
        self.predicted_steps = 0  # applied ones whose batch had a token to predict
        self._has_warned = False
        self.left_out, self.works_on_shards = left_out, works_on_shards
        self.skipped: list[range] = []  # 1-based steps, by rollbacks
        self.spike: Spike | None = None  # of the step just finished
        self._in_a_row = 0
        self.computed = True
        """Whether the step just finished ran forward and backward; those that are left out do not."""
        self._applied = True
        self._loss: float | None = None  # of the step under way, once it is done with
        self._batch: Any = None
        self._wrapped = False

    def batch_start(self, state: State, logger: Logger) -> None:
        self._loss, self._batch = None, state.batch

    def fit_start(self, state: State, logger: Logger) -> None:
        (optimizer,) = state.optimizers
        if self._wrapped:
            return
        self._wrapped, apply = True, optimizer.step

        def step(closure: Callable[[], float]) -> float:
            if self._loss is not None:
                # Composer logs this, and tells the callbacks; a closure that does not run leaves zero there.
                inspect.signature(closure).parameters["loss_dict"].default[_LOSS].fill_(self._loss)
                return self._loss
            number = state.timestamp.batch.value + 1
            if any(number in steps for steps in (*self.skipped, *self.left_out)):
                self.computed, self._applied, self._loss = False, False, 0.0
                return 0.0
            state.batch = self._batch  # out of memory, Composer leaves a microbatch there
            loss, self.computed = closure(), True
            self._applied = not ranks.on_any_rank(_not_finite(loss, optimizer))
            if self._applied:
                self._in_a_row = 0
                self._apply(number, apply)
            else:
                self._count_bad(number, state)
            self._loss = loss
            return loss

        optimizer.step = step  # pyright: ignore[reportAttributeAccessIssue]

    def batch_end(self, state: State, logger: Logger) -> None:
        self.spike = None
        step = state.timestamp.batch.value
        if not self._applied:
            state.total_loss_dict = {**state.total_loss_dict, _LOSS: math.nan}
        elif (loss := predicted_loss(state)) is None:
            self._warn_of_nothing(step)
        else:
            self.predicted_steps += 1
            if self.detector is not None:
                self.spike = self.detector.look(step, loss, self.phase_of(step - 1))

    def _warn_of_nothing(self, step: int) -> None:
        if not self._has_warned and ranks.rank() == 0:
            log.warning(
                "NOTHING TO PREDICT IN STEP %d: its rows hold special and unknown tokens only, so it trains on nothing "
                "and has no loss. Does the tokenizer know the text? See `main.py inspect`. Said once",
                step,
            )
        self._has_warned = True

    def state_dict(self) -> dict[str, Any]:
        """JSON values for the checkpoint."""
        detector = self.detector and self.detector.state_dict()
        return {
            "bad_steps": self.bad_steps,
            "predicted_steps": self.predicted_steps,
            "in_a_row": self._in_a_row,
            "detector": detector,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bad_steps, self._in_a_row = state["bad_steps"], state["in_a_row"]
        self.predicted_steps = state.get("predicted_steps", 1)  # older checkpoints do not say: not known to be none
        if self.detector is not None:
            self.detector.load_state_dict(state["detector"] or SpikeDetector(1.0, 2).state_dict())

    def _apply(self, number: int, apply: Callable[[], Any]) -> None:
        try:
            apply()
        except torch.OutOfMemoryError as error:
            # Half of the weights may be updated: a repeated batch would update them twice. And what is in memory now
            # does not depend on the microbatch.
            other = "shard it with trainer.parallelism=fsdp2" if self.works_on_shards else "take another optimizer"
            raise RunError(
                f"step {number}: no memory for the optimizer's update, whatever trainer.microbatch_size is: {other}, "
                "or take a smaller model"
            ) from error

    def _count_bad(self, number: int, state: State) -> None:
        self.bad_steps += 1
        self._in_a_row += 1
        if self._in_a_row >= self.max_bad_steps:
            raise DivergedError(
                f"step {number}: loss or gradient not finite in {self._in_a_row} steps in a row "
                f"(trainer.max_bad_steps), none of them applied; {self.culprit(state)}: lower lr, or look at the rows "
                f"with `inspect RUN --step {number}`"
            )


def _not_finite(loss: float, optimizer: torch.optim.Optimizer) -> bool | Tensor:
    """On this rank. A norm that overflows float32 counts as infinite: on CUDA, which adds up squares in float32, one
    over 1.8e19. With clipping gradients are NaN by then (callbacks/gradients.py)."""
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients if g is not None]
    if not math.isfinite(loss) or not local:
        return not math.isfinite(loss)
    if local[0].device.type == "cpu":
        # Torch computes the norms of rows on all cores, that of a whole tensor on one.
        rows = [torch.linalg.vector_norm(g, dim=-1).flatten() if g.ndim > 1 else g.flatten() for g in local]
        return ~torch.isfinite(torch.linalg.vector_norm(torch.cat(rows)))
    return ~torch.isfinite(torch.nn.utils.get_total_norm(local))
