"""What a run does when something goes wrong, or when it is asked to stop: one object that the trainer asks."""

from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer.core import State
from torch.nn.parallel import DistributedDataParallel

import ranks
from callbacks.culprit import name_culprit
from callbacks.guards import Spike, SpikeDetector, StepGuard
from callbacks.ledger import Ledger, first_and_last, knows_rollbacks
from data.feed.batches import Batch
from flexbert_core.durable import remove_folder
from flexbert_core.schema import RunError
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from recipe.slots import OPTIMIZERS
from training import signals
from training.checkpoints.files import Checkpoint, list_checkpoints, newest_checkpoint, tokens_of
from training.checkpoints.saver import Saver
from training.compiling import eagerly

# What gloo and NCCL say (torch/csrc/distributed/c10d/NCCLUtils.hpp and ProcessGroupNCCL.cpp).
_LOST = ("Connection closed by peer", "Connection reset by peer", "NCCL communicator was aborted", "ncclRemoteError")
_LOST += ("remote process exited or there was a network error", "Watchdog caught collective operation timeout")
COLLECTIVE_MARGIN = 60.0  # seconds by which a collective waits longer than the watchdog, which says more


class Faults:
    """Bad steps, loss spikes, signals; with them, which checkpoint a run goes on from."""

    def __init__(
        self,
        config: RunConfig,
        plan: PhasePlan,
        saver: Saver,
        ledger: Ledger,
        say: Callable[[str], None],
        split_batch: Callable[[Batch], list[Batch]],
        generator_seed: Callable[[int], int],
    ) -> None:
        """say: prints a line, on rank 0. generator_seed: of torch's global one, in a step on this rank."""
        self.plan, self.saver, self.ledger, self.say = plan, saver, ledger, say
        self.options = config.trainer.spike_guard
        self.preempted = self.rolled_back = False
        self._split_batch, self._generator_seed = split_batch, generator_seed
        detector = SpikeDetector(self.options.sigmas, self.options.window) if self.options else None
        options = config.trainer
        self.guard = StepGuard(
            options.max_bad_steps,
            lambda step: plan.at(step).name,
            self._culprit,
            detector,
            options.skipped,
            getattr(OPTIMIZERS.entries[config.optimizer.name], "works_on_shards", False),
        )

    def checkpoint(self) -> Checkpoint | None:
        """The newest whole one of this run's history: one that knows nothing of a rollback to before it is of a
        history that was given up. Learns from the ledger what to skip. A collective."""
        self.guard.skipped = skipped = ranks.from_rank_0(self.ledger.skips())
        return newest_checkpoint(self.saver.folder, lambda state: knows_rollbacks(state, skipped))

    def state_dict(self) -> dict[str, Any]:
        """JSON values for the checkpoint."""
        return {**self.guard.state_dict(), "skipped": [first_and_last(steps) for steps in self.guard.skipped]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.guard.load_state_dict(state)

    def check_start(self) -> None:
        """Raises SystemExit(EXIT_PREEMPTED) when a rank was asked to stop before the first step. A collective."""
        if ranks.on_any_rank(signals.received()):
            raise SystemExit(signals.EXIT_PREEMPTED)

    def check_predicted(self, step: int) -> None:
        """Raises RunError when no step so far had a token to predict: its weights are those of the start."""
        if step and not self.guard.predicted_steps:
            raise RunError(
                f"none of the {step:,} steps had a token to predict: streams {', '.join(self.ledger.stream_names)} "
                "hold special and unknown tokens only, or no step was applied: see `main.py inspect`, and prepare "
                "them with a tokenizer that knows their text; nothing is exported"
            )

    def leave(self, step: int, save: Callable[[int], None]) -> bool:
        """Whether training leaves its loop after this step: rolled back, or asked to stop on any rank, and saved. A
        collective."""
        spike = self.guard.spike
        self.rolled_back = spike is not None and self._roll_back(spike)
        self.preempted = not self.rolled_back and ranks.on_any_rank(signals.received())
        if self.preempted:
            save(step)
        return self.rolled_back or self.preempted

    def _roll_back(self, spike: Spike) -> bool:
        """Take the spike's steps out of the run, so that `checkpoint` gives one from before them.

        Returns False, with a line that says why, when that is not possible, or was just done and did not help.
        """
        assert self.options is not None
        self.saver.settle()
        skip = range(spike.step - self.options.skip + 1, spike.step + 1)
        limit = self.plan.tokens_before(skip.start - 1)
        before = [path for path in list_checkpoints(self.saver.folder) if tokens_of(path) <= limit]
        target = ranks.from_rank_0(before[-1].name if before else None)
        what = f"LOSS SPIKE in step {spike.step}: {spike.loss:.4f}, mean {spike.mean:.4f}, sigma {spike.sigma:.4f}"
        if any(steps.stop + self.options.window > spike.step for steps in self.guard.skipped):
            self.say(f"{what}; steps just before were skipped already, so it is not their rows: training goes on")
        elif target is None:
            self.say(f"{what}; no checkpoint is older than the {len(skip)} steps to skip: training goes on")
        else:
            self.say(f"{what}; back to {target}, and steps {skip.start} to {spike.step} are skipped")
            if ranks.rank() == 0:
                step = bisect_left(range(self.plan.total_steps), tokens_of(Path(target)), key=self.plan.tokens_before)
                self.ledger.write_skip(step, skip, spike._asdict())
                for path in list_checkpoints(self.saver.folder):
                    if tokens_of(path) > limit:
                        remove_folder(path)
            ranks.barrier()
            return True
        return False

    def _culprit(self, state: State) -> str:
        microbatches = self._split_batch(state.batch)
        model = state.model.module if isinstance(state.model, DistributedDataParallel) else state.model
        seed = self._generator_seed(state.timestamp.batch.value)
        with eagerly():  # compiled blocks have hooks for few of their modules
            return name_culprit(state, model, microbatches, seed)


def lost_rank(error: RuntimeError) -> RunError | None:
    """What to say when a collective fails since another rank's process is gone."""
    if not any(text in str(error) for text in _LOST):
        return None
    return RunError(
        "another rank's process ended, and says why itself; the same command goes on from the newest checkpoint"
    )
