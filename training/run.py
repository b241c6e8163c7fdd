"""One run in this process: what it is made of, what a checkpoint of it holds, and how it goes on."""

import functools
import gc
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from composer.core import DataSpec, Precision, Timestamp
from composer.trainer import Trainer
from composer.utils import dist
from rich.console import Console

import ranks
from callbacks.clock import Clock
from callbacks.ema import WeightAverage
from callbacks.ledger import Ledger
from callbacks.metrics_file import MetricsFile
from callbacks.milestones import BetweenSteps
from callbacks.progress import ProgressLine
from callbacks.schedule import StepSchedule
from callbacks.step_log import read_lines
from callbacks.watchdog import Watchdog
from data.feed.loader import Loader, build_loader
from data.keyed import torch_seed
from flexbert import build
from flexbert.config import without_init
from flexbert_core.durable import write_file
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from recipe.slots import OPTIMIZERS
from training import signals
from training.branching import read_origin
from training.checkpoints.files import checkpoint_name, list_checkpoints, restore, take_snapshot
from training.checkpoints.remote import RemoteCheckpoints
from training.checkpoints.saver import Saver
from training.composer_model import Microbatch, PretrainingModel, split_batch
from training.curves import draw_curves
from training.ema import restore_average
from training.evaluations import Evaluations
from training.exporting import Exporter
from training.faults import Faults
from training.folder import RunFolder
from training.gauges import build_gauges, gauges_state, load_gauges
from training.growing import read_source
from training.parallelism import PARALLELISMS, Parallelism
from training.parts import Parts, build_objective, pack, unpack
from training.publisher import Publisher
from training.same_data import check_same_data
from training.vocabulary import check_vocabulary

log = logging.getLogger(__name__)


class Run:
    """A run in this process: built by `train`, torn down at its end."""

    def __init__(self, config: RunConfig, console: Console, watchdog: Watchdog) -> None:
        self.config, self.console, self.watchdog = config, console, watchdog
        self.plan = PhasePlan(config)
        self.folder = RunFolder(config.folder)
        self.rank, self.world_size = ranks.rank(), ranks.world_size()
        self.loader: Loader = build_loader(self.plan.loader_config(config), self.rank, self.world_size)
        self.loader.dataset.check_maskings()
        train_streams = self.loader.dataset.streams
        manifest = train_streams[0].manifest
        self.fingerprints = {
            name: stream.fingerprint for name, stream in zip(config.data.streams, train_streams, strict=True)
        }
        # Before anything is written: a branch that cannot start leaves no trace. A resumed one needs no origin.
        resumed = bool(list_checkpoints(self.folder.checkpoints))
        self.start = None if resumed else read_origin(config)
        if not resumed:
            check_vocabulary(config, train_streams, self.start and self.start.rows)
        if self.start is not None:
            self.start.check_data(config, self.fingerprints, manifest.tokenizer_fingerprint)
        self.origin: dict[str, Any] | None = None
        self.tokenizer = manifest.tokenizer_fingerprint
        fresh = not resumed and self.start is None
        model = config.model if fresh else without_init(config.model)
        self.model = build(model, seed=torch_seed(config.seed, "init"), grow_from=read_source(model))
        if torch.cuda.is_available():
            self.model = self.model.to(f"cuda:{dist.get_local_rank()}")
        self.parallelism: Parallelism = PARALLELISMS.build(config.trainer.parallelism, world_size=self.world_size)
        precision = config.trainer.precision
        bf16 = torch.cuda.is_available() if precision == "auto" else precision == "amp_bf16"
        device = next(self.model.parameters()).device.type
        self.autocast = functools.partial(torch.autocast, device, torch.bfloat16, bf16)
        self.model.encoder.recompute_every = config.trainer.activation_checkpointing
        if config.trainer.compile:
            self.model.compile_blocks()
        self.optimizer = OPTIMIZERS.build(config.optimizer, model=self.model, lr=self.plan.phases[0].peak_lr)
        self.ledger = Ledger(self.folder.ledger, list(config.data.streams))
        remote = RemoteCheckpoints(config) if config.checkpoint.remote and self.rank == 0 else None
        self.saver = Saver(self.folder.checkpoints, config.checkpoint, self._is_permanent, self._written, remote)
        self.faults = Faults(config, self.plan, self.saver, self.ledger, self._say, split_batch, self._generator_seed)
        self.clock = Clock(config.trainer.log_interval, self.ledger, self.plan)
        guard = self.faults.guard
        self.gauges = build_gauges(config, self.plan, self.model, self.clock, guard, lambda: self.seconds)
        self.metrics = MetricsFile(self.folder.metrics, self.plan)
        self.parts = Parts(config, self.plan, self.folder.path)
        ema = config.ema
        self.ema = None if ema is None else WeightAverage(self.model, ema.decay, self.plan, ema.every)
        self.objective = build_objective(config, self.plan)
        self.evaluations = Evaluations(config, self.plan, train_streams, self.model, self.ema, self.autocast, self._say)
        self.exporter = Exporter(config, self.plan, self.model, self.ema, self.folder.exports, self.metrics)
        self.publisher = Publisher(config, self.folder.path, self.rank)
        self.seconds_before = 0.0  # of earlier processes, up to their last checkpoint
        self.started = time.monotonic()
        self._trainer: Trainer | None = None

    @property
    def trainer(self) -> Trainer:
        """Composer's trainer, there after `open`."""
        assert self._trainer is not None
        return self._trainer

    def open(self) -> None:
        """Take the run folder and build Composer's trainer: nothing was written before this. A collective."""
        if self.rank == 0:
            self.folder.open(self.config)
        ranks.barrier()
        self._trainer = self._build_trainer()

    def close(self) -> None:
        """Let the checkpoint under way and the loggers finish, and others into the folder."""
        try:
            self.saver.join()
        finally:
            if self._trainer is not None:
                self._trainer.engine.close()  # Trainer.close is a collective: after an error the others are elsewhere
            self.folder.close()

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def _generator_seed(self, step: int) -> int:
        """Of the global generator, in a step on this rank. It draws the dropout of attention weights."""
        return torch_seed(self.config.seed, "dropout", self.steps_before + step, self.rank)

    def _dropout_seed(self) -> int:
        """Of all other dropout in the step under way, on every rank."""
        return torch_seed(self.config.seed, "dropout", self.steps_before + self.trainer.state.timestamp.batch.value)

    def _build_trainer(self) -> Trainer:
        config = self.config
        compiled = config.trainer.compile
        model = PretrainingModel(
            self.model, self.objective, self.parallelism, self.autocast, compiled, self._dropout_seed
        )
        data = DataSpec(
            self.loader,
            split_batch=split_batch,
            microbatch_transforms=Microbatch,
            get_num_samples_in_batch=lambda batch: len(batch["sequences"]),
            get_num_tokens_in_batch=model.count_tokens,  # pyright: ignore[reportArgumentType]
        )
        between = BetweenSteps(
            [
                (self.plan.is_milestone, self.faults.check_predicted),
                (self.evaluations.due, self._evaluate),
                (self._checkpoint_due, self._save),
                (self.exporter.due, self._export),
            ],
            on_resume=self._catch_up,
            after=self.clock.restart,
            leave=lambda step: self.faults.leave(step, self._save),
        )
        schedule = StepSchedule(self.plan, self.model, self._generator_seed)
        callbacks = [
            self.faults.guard,
            schedule,
            self.watchdog,
            self.ledger,
            self.clock,
            *self.gauges,
            *self.parts.callbacks,
            *([self.ema] if self.ema else []),
            between,
            *self.evaluations.callbacks,
        ]
        if self.rank == 0:
            callbacks.insert(3, ProgressLine(self.console, self.plan, self.metrics))
        trainer = Trainer(
            model=model,
            train_dataloader=data,
            max_duration=f"{self.plan.total_steps}ba",
            optimizers=self.optimizer,
            algorithms=self.parts.algorithms,
            callbacks=callbacks,
            loggers=[self.metrics, *self.parts.loggers],
            run_name=config.name,
            seed=torch_seed(config.seed, "composer") % 2**32,
            precision=Precision.FP32,  # see PretrainingModel
            device_train_microbatch_size=self._microbatch_size(),
            accumulate_train_batch_on_tokens=True,
            spin_dataloaders=False,
            progress_bar=False,
            log_to_console=False,
            python_log_level=None,
            **self.parallelism.options(self.model),
        )
        self.parallelism.prepared(self.model)
        return trainer

    def _microbatch_size(self) -> int | str:
        """Rows, or "auto": then Composer finds them, from the loader's `batch_size` down."""
        given, rows = self.config.trainer.microbatch_size, self.loader.batch_size
        if given == "auto" and not torch.cuda.is_available():
            self._say(f"trainer.microbatch_size: auto, on the CPU: all rows of a rank at once, up to {rows}")
            return rows
        return given or rows

    def resume(self) -> int:
        """Load the newest whole checkpoint, if any, into everything. Returns the number of finished steps."""
        checkpoint = self.faults.checkpoint()
        if checkpoint is None:
            self._begin()
            return 0
        state = checkpoint.state
        check_same_data(checkpoint, self.fingerprints, self.evaluations.held_out.fingerprints)
        restore(checkpoint, self.model, self.optimizer)
        self.loader.load_state_dict(state["loader"])
        self.ledger.load_state_dict(state["ledger"])
        load_gauges(self.clock, self.gauges, state["metrics"])
        self.parts.load_state_dict(state.get("parts", {}), checkpoint.parts)
        if self.ema is not None:
            restore_average(checkpoint, self.model, self.ema)
        self.faults.load_state_dict(state["faults"])
        self.evaluations.evaluated = state["evaluated"]
        self.seconds_before, self.origin = state["seconds"], state.get("origin")
        step = int(state["step"])
        if step:
            phase = self.plan.at(step - 1)
            self.model.set_rope_theta(phase.theta_global, phase.theta_local)
        self.trainer.state.timestamp = self._timestamp(step, state)
        if self.rank == 0:
            self.folder.note_checkpoint(checkpoint.path)  # a kill may have come just before the note
            self.metrics.trim(step)
            self.ledger.trim(step)
        return step

    def _timestamp(self, step: int, state: dict[str, Any]) -> Timestamp:
        """Composer's clock after `step` steps, so that what counts in its tokens or samples goes on."""
        timestamp = Timestamp(batch=step, batch_in_epoch=step)
        if "timestamp" in state:  # not up to commit ac193e8, nor of a branch's first checkpoint
            timestamp.load_state_dict(unpack(state["timestamp"], {}))
        return timestamp

    def _begin(self) -> None:
        """Start at step 0; a branch with its origin's state, which becomes its own first checkpoint. A collective."""
        if self.rank == 0:
            lost = max((line["step"] for line in read_lines(self.folder.metrics)), default=0)
            if lost:
                log.warning(
                    "STARTING AGAIN AT STEP 0: %s had trained %d steps, and was ended before its first checkpoint",
                    self.folder.path,
                    lost,
                )
            self.metrics.trim(0)
            self.ledger.trim(-1)
        if self.start is None:
            return
        self.start.apply(self.model, self.optimizer, self.loader, self.ema)
        self.origin, self.start = self.start.record, None
        if self.rank == 0:
            write_file(self.folder.origin, json.dumps(self.origin, indent=1))
        self._save(0)

    @property
    def steps_before(self) -> int:
        """Steps of the runs that this one continues: random draws go on from there."""
        return self.origin["steps"] if self.origin else 0

    def fit(self, step: int) -> None:
        """Train from `step` to the end of the last phase. Raises SystemExit(EXIT_PREEMPTED) when asked to stop."""
        while step < self.plan.total_steps:
            self.faults.check_start()
            self.trainer.state.max_duration = f"{self.plan.total_steps}ba"
            # What is there by now, a million objects of libraries, stays: no collection of this process or of the
            # loader's workers, which are its forks, needs to walk through it.
            gc.collect()
            gc.freeze()
            try:
                self.trainer.fit()
            finally:
                gc.unfreeze()
            if self.faults.preempted:
                self.saver.settle_last(finished=False)
                self.trainer.close()  # together: a launcher kills the rest when the first rank is gone
                raise SystemExit(signals.EXIT_PREEMPTED)
            if not self.faults.rolled_back:
                return
            step = self.resume()
            self.exporter.forget_after(step)

    def _checkpoint_due(self, step: int) -> bool:
        options = self.config.checkpoint
        best = options.keep_best > 0 and self.evaluations.evaluated == step
        every = [getattr(entry, "every", None) for entry in self.config.evaluations]
        wanted = any(self.plan.crosses(step, interval) for interval in [options.interval, *every])
        return best or self._is_permanent(step) or wanted

    def _written(self, path: Path) -> None:
        """Told of each whole checkpoint, before older ones go (rank 0, on the saver's thread)."""
        self.folder.note_checkpoint(path)
        self.evaluations.written(path)

    def _is_permanent(self, step: int) -> bool:
        """Whether the checkpoint after `step` steps is kept for ever."""
        return self.plan.is_permanent(step, self.config.checkpoint.keep_every)

    def _catch_up(self, step: int) -> None:
        """What an interruption just after this step left out."""
        if step and self.evaluations.due(step) and self.evaluations.evaluated != step:
            self._evaluate(step)
        if self.plan.is_milestone(step):
            self.faults.check_predicted(step)
        if self.exporter.due(step):
            self._export(step)
        else:
            self.publisher.push()  # what an earlier process left behind

    def _export(self, step: int) -> None:
        self.exporter.export(step)
        self.publisher.push()

    def _evaluate(self, step: int) -> None:
        self.evaluations.run(step, self.trainer.logger)

    def _save(self, step: int) -> None:
        self.saver.settle()
        self.metrics.flush()
        parts, part_tensors = self.parts.state_dict()
        timestamp = pack(self.trainer.state.timestamp.state_dict(), "timestamp", {})
        state = {
            "step": step,
            "loader": self.loader.state_dict(),
            "ledger": self.ledger.state_dict(),
            "metrics": gauges_state(self.clock, self.gauges),
            "parts": parts,
            "timestamp": timestamp,
            "data": self.fingerprints,
            "validation_data": self.evaluations.held_out.fingerprints,
            "tokenizer": self.tokenizer,
            "origin": self.origin,
            "seconds": self.seconds,
            "faults": self.faults.state_dict(),
            "ema": self.ema and self.ema.state_dict(),
            "evaluated": self.evaluations.evaluated,
            "validation_loss": self.evaluations.loss_at(step),
        }
        self.ledger.write(step, self.plan.tokens_before(step), state["loader"]["lanes"], self.fingerprints)
        snapshot = take_snapshot(
            self.model, self.optimizer, self.ema and self.ema.tensors(), part_tensors, wanted=self.rank == 0
        )
        if self.rank == 0:
            path = self.folder.checkpoints / checkpoint_name(self.plan.tokens_before(step))
            self.saver.start(path, snapshot, state)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of this run's processes, less what a kill threw away."""
        return self.seconds_before + time.monotonic() - self.started

    def finish(self) -> dict[str, Any]:
        """Last checkpoint, evaluation, export and summary of a run whose steps are done. Returns the summary."""
        self.saver.settle_last()
        step = self.plan.total_steps
        self.faults.check_predicted(step)
        if self.evaluations.latest is None or self.evaluations.latest[0] != step:
            self._evaluate(step)
        self.exporter.export(step)
        assert self.evaluations.latest is not None
        stream_tokens = self.ledger.real_tokens()
        tokens, export = sum(stream_tokens.values()), self.exporter.path(step)
        summary = {
            "tokens": tokens,
            "tokens_per_second": tokens / self.clock.train_seconds,
            "packing_efficiency": tokens / self.plan.total_tokens,
            "validation": self.evaluations.latest[1],
            "stream_tokens": stream_tokens,
            "streams": self.ledger.totals(),
            "steps": step,
            "export": str(export) if export.exists() else None,
            "seconds": self.seconds,
            "train_seconds": self.clock.train_seconds,
        }
        if self.rank == 0:
            draw_curves(self.folder.metrics, self.folder.curves, self.plan)
            write_file(self.folder.summary, json.dumps(summary, indent=1))
        self.watchdog.stop()  # what goes on beside the run may take longer than a step may
        self.evaluations.finish(self.trainer.logger)
        return summary
