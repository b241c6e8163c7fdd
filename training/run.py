"""One run in this process: what it is made of, what a checkpoint of it holds, and how it goes on."""

import functools
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from composer.core import DataSpec, Precision
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
from training.compiling import compile_blocks, eagerly, microbatch_sizes
from training.composer_model import Microbatch, PretrainingModel
from training.curves import draw_curves
from training.ema import restore_average
from training.evaluations import Evaluations
from training.exporting import Exporter
from training.faults import Faults
from training.finished import summary_of
from training.fitting import fitting_rows
from training.folder import RunFolder
from training.gauges import build_gauges, gauges_state, load_gauges
from training.growing import read_source
from training.microbatches import Microbatches
from training.objectives.phases import Objectives
from training.parallelism import PARALLELISMS, Parallelism
from training.parts import Parts, pack, timestamp_of
from training.precision import computes_in_bf16, multiply_in_float32
from training.publisher import Publisher
from training.same_data import check_same_data
from training.states import state_bytes
from training.vocabulary import check_vocabulary


class Run:
    """A run in this process: built by `train`, torn down at its end."""

    def __init__(self, config: RunConfig, console: Console, watchdog: Watchdog, until: int | None = None) -> None:
        self.config, self.console, self.watchdog = config, console, watchdog
        self.plan = PhasePlan(config)
        self.end = self.plan.total_steps if until is None else self.plan.step_at(until)  # of `fit`: saved and measured
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
        # As rank 0 sees it: a network file system may show the others an older folder, and they would wait for ever.
        resumed = ranks.from_rank_0(bool(list_checkpoints(self.folder.checkpoints)))
        self.start = None if resumed else read_origin(config)
        if not resumed:
            check_vocabulary(config, train_streams, self.start and self.start.rows)
        if self.start is not None:
            self.start.check_data(config, self.fingerprints, manifest.tokenizer_fingerprint)
        self.origin, self.tokenizer = None, manifest.tokenizer_fingerprint
        model = without_init(config.model) if resumed or self.start is not None else config.model
        self.model = build(model, seed=torch_seed(config.seed, "init"), grow_from=read_source(model))
        self.model.encoder.config = config.model  # its exports tell the file's `init`, in whatever process
        self.model.encoder.recompute_every = config.trainer.activation_checkpointing
        self.objectives = Objectives(config, self.plan, self.model)
        if torch.cuda.is_available():
            self.model = self.model.to(f"cuda:{dist.get_local_rank()}")
        self.parallelism: Parallelism = PARALLELISMS.build(config.trainer.parallelism, world_size=self.world_size)
        device = next(self.model.parameters()).device.type
        self.bf16 = computes_in_bf16(config.trainer.precision)
        self.autocast = functools.partial(torch.autocast, device, torch.bfloat16, self.bf16)
        self.microbatches = Microbatches(config.trainer, pins=device == "cuda")
        self.optimizer = OPTIMIZERS.build(config.optimizer, model=self.model, lr=self.plan.phases[0].peak_lr)
        self.ledger = Ledger(self.folder.ledger, list(config.data.streams))
        remote = RemoteCheckpoints(config, watchdog.beat) if config.checkpoint.remote else None
        self.saver = Saver(self.folder.checkpoints, config.checkpoint, self._is_permanent, self._written, remote)
        self.faults = Faults(
            config, self.plan, self.saver, self.ledger, self._say, self.microbatches, self._generator_seed
        )
        self.clock = Clock(config.trainer.log_interval, self.ledger, self.plan)
        self.gauges = build_gauges(config, self.plan, self.model, self.clock, self.faults.guard, lambda: self.seconds)
        self.metrics = MetricsFile(self.folder.metrics, self.plan)
        self.parts = Parts(config, self.plan, self.folder.path)
        ema = config.ema
        self.ema = None if ema is None else WeightAverage(self.model, ema.decay, self.plan, ema.every)
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

    @property
    def steps_done(self) -> int:
        """Of the run, as far as this process knows."""
        return 0 if self._trainer is None else self._trainer.state.timestamp.batch.value

    def open(self) -> None:
        """Take the run folder and build Composer's trainer: nothing was written before this. A collective."""
        if self.rank == 0:
            self.folder.open(self.config)
        ranks.barrier()
        if self.config.trainer.microbatch_size == "auto":
            self._fit_microbatches()
        if self.config.trainer.compile:
            sizes = microbatch_sizes(self.plan, self.microbatches.rows, self.world_size)
            compile_blocks(self.model, len(sizes))
        self._trainer = self._build_trainer()
        multiply_in_float32()

    def _fit_microbatches(self) -> None:
        """Find the rows of `auto`. A collective."""
        probe = PretrainingModel(self.model, self.objectives.each, self.parallelism, self.autocast, lambda: 0)
        states = state_bytes(self.config, self.model)
        self.microbatches.found = fitting_rows(self.plan, probe, self.world_size, states)
        for length, rows in self.microbatches.found.items():
            self._say(f"trainer.microbatch_size: auto: up to {rows} rows of {length} at a time on each rank")

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
        model = PretrainingModel(self.model, self.objectives.each, self.parallelism, self.autocast, self._dropout_seed)
        data = DataSpec(
            self.loader,
            split_batch=self.microbatches,
            microbatch_transforms=Microbatch,
            get_num_samples_in_batch=lambda batch: len(batch["sequences"]),
            get_num_tokens_in_batch=model.count_tokens,  # pyright: ignore[reportArgumentType]
        )
        between = BetweenSteps(
            [
                (self.plan.is_milestone, self.faults.check_predicted),
                (self._evaluation_due, self._evaluate),
                (self._checkpoint_due, self._save),
                (self.exporter.due, self._export),
            ],
            on_resume=self._catch_up,
            after=self.clock.restart,
            leave=lambda step: self.faults.leave(step, self._save),
        )
        first = self.plan.phases[0]
        callbacks = [
            self.faults.guard,
            StepSchedule(self.plan, self.model, self._generator_seed),
            self.objectives,
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
            callbacks.insert(4, ProgressLine(self.console, self.plan, self.metrics))
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
            device_train_microbatch_size=self.microbatches.rows(first.max_seq_len, self.loader.batch_size),
            accumulate_train_batch_on_tokens=True,
            spin_dataloaders=False,
            progress_bar=False,
            log_to_console=False,
            python_log_level=None,
            **self.parallelism.options(self.model, self.bf16),
        )
        self.parallelism.prepared(self.model)
        return trainer

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
        self.objectives.resumed(step)
        self.trainer.state.timestamp = timestamp_of(step, state)
        if self.rank == 0:
            self.folder.note_checkpoint(checkpoint.path)  # a kill may have come just before the note
            self.metrics.trim(step)
            self.ledger.trim(step)
        return step

    def _begin(self) -> None:
        """Start at step 0; a branch with its origin's state, measured and saved as its own first one. A collective."""
        if self.rank == 0:
            self.folder.say_lost_steps()
            self.metrics.trim(-1)
            self.ledger.trim(-1)
        if self.start is not None:
            self.start.apply(self.model, self.optimizer, self.loader, self.ema)
        self.objectives.resumed(0)
        if self.start is None:
            return
        self.origin, self.start = self.evaluations.of_start(self.start.record, self.trainer.logger), None
        if self.rank == 0:
            write_file(self.folder.origin, json.dumps(self.origin, indent=1))
        self._save(0)

    @property
    def steps_before(self) -> int:
        """Steps of the runs that this one continues: random draws go on from there."""
        return self.origin["steps"] if self.origin else 0

    def fit(self, step: int) -> None:
        """Train from `step` to `end`. Raises SystemExit(EXIT_PREEMPTED) when asked to stop."""
        while step < self.end:
            self.faults.check_start()
            self.trainer.state.max_duration = f"{self.end}ba"
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
            seconds = self.seconds_before
            step = self.resume()
            self.seconds_before = seconds  # this process goes on: what it gave up was computed, and is paid for
            self.exporter.forget_after(step)

    def _evaluation_due(self, step: int) -> bool:
        return step == self.end or self.evaluations.due(step)

    def _checkpoint_due(self, step: int) -> bool:
        options = self.config.checkpoint
        best = options.keep_best > 0 and self.evaluations.evaluated == step
        every = [getattr(entry, "every", None) for entry in self.config.evaluations]
        wanted = any(self.plan.crosses(step, interval) for interval in [options.interval, *every])
        return best or self._is_permanent(step) or wanted or step == self.end

    def _written(self, path: Path) -> None:
        """Told of each whole checkpoint, before older ones go (rank 0, on the saver's thread)."""
        self.folder.note_checkpoint(path)
        self.evaluations.written(path)

    def _is_permanent(self, step: int) -> bool:
        """Whether the checkpoint after `step` steps is kept for ever."""
        return self.plan.is_permanent(step, self.config.checkpoint.keep_every)

    def _catch_up(self, step: int) -> None:
        """What an interruption just after this step left out."""
        if step and self._evaluation_due(step) and self.evaluations.evaluated != step:
            self._evaluate(step)
        if self.plan.is_milestone(step):
            self.faults.check_predicted(step)
        if self.exporter.due(step):
            self._export(step)
        else:
            self.publisher.push()  # what an earlier process left behind

    def _export(self, step: int) -> None:
        with eagerly():
            self.exporter.export(step)
        self.publisher.push()

    def _evaluate(self, step: int) -> None:
        with eagerly():
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

    def pause(self, step: int) -> None:
        """End where `until` said, as a run that goes on later. step: where `fit` began. A collective."""
        if step == self.end:  # its checkpoint may be older than the wish for a loss there
            self._catch_up(step)
        self.saver.settle_last(finished=False)
        self.trainer.close()  # together: a launcher kills the rest when the first rank is gone

    def finish(self) -> dict[str, Any]:
        """Last checkpoint, evaluation, export and summary of a run whose steps are done. Returns the summary."""
        self.saver.settle_last()
        step = self.plan.total_steps
        self.faults.check_predicted(step)
        if self.evaluations.latest is None or self.evaluations.latest[0] != step:
            self._evaluate(step)
        with eagerly():
            self.exporter.export(step)
        assert self.evaluations.latest is not None
        validation, export = self.evaluations.latest[1], self.exporter.path(step)
        seconds = self.clock.train_seconds, self.seconds
        summary = summary_of(self.plan, self.ledger, validation, export, *seconds, self.origin)
        if self.rank == 0:
            draw_curves(self.folder.metrics, self.folder.curves, self.plan)
            write_file(self.folder.summary, json.dumps(summary, indent=1))
        self.watchdog.stop()  # what goes on beside the run may take longer than a step may
        self.evaluations.finish(self.trainer.logger)
        return summary
