"""What a run exports: its weights, and their moving average, as folders for `transformers`. At milestones, and with
checkpoint.exports `permanent` also at step 0 and wherever a checkpoint is kept for ever."""

import logging
from pathlib import Path

import flexbert
import ranks
from callbacks.ema import WeightAverage
from callbacks.metrics_file import MetricsFile
from data.feed.loader import tokenizer_folder
from flexbert.hf.convert import check_exportable
from flexbert.hf.parts import outside
from flexbert.model import FlexBertForMaskedLM
from flexbert_core.durable import remove_folder
from flexbert_core.schema import ConfigError, RunError
from recipe.config import RunConfig
from recipe.origin import read_origin_record
from recipe.phases import PhasePlan
from recipe.slots import OBJECTIVES
from training import report
from training.checkpoints.files import checkpoint_name
from training.checkpoints.sharded import whole_model
from training.objectives.phases import alone

log = logging.getLogger(__name__)


class Exporter:
    """Writes exports/tokens-N and, with an average, exports/tokens-N-ema; what is there already is left."""

    def __init__(
        self,
        config: RunConfig,
        plan: PhasePlan,
        model: FlexBertForMaskedLM,
        ema: WeightAverage | None,
        folder: Path,
        metrics: MetricsFile,
    ) -> None:
        self.config, self.plan, self.model, self.ema = config, plan, model, ema
        self.folder, self.metrics = folder, metrics

    def path(self, step: int, suffix: str = "") -> Path:
        return self.folder / (checkpoint_name(self.plan.tokens_before(step)) + suffix)

    def due(self, step: int) -> bool:
        """Whether the weights after `step` steps are exported."""
        return self.plan.is_exported(step, self.config.checkpoint.keep_every, self.config.exports_permanent)

    def forget_after(self, step: int) -> None:
        """Remove exports of later steps (rank 0): the run went back to this one, and will have other weights there."""
        entries = [OBJECTIVES.entries[phase.objective.name] for phase in self.plan.phases]
        kinds = dict.fromkeys(kind for entry in entries for kind in getattr(entry, "export_kinds", ()))
        folders = [self.folder, *(self.folder.parent / kind for kind in kinds)]
        paths = [path for folder in folders for path in folder.glob("tokens-*")]
        for path in paths if ranks.rank() == 0 else ():
            if int(path.name.split("-")[1]) > self.plan.tokens_before(step):
                log.warning("%s: removed: the run went back to step %d", path, step)
                remove_folder(path)

    def export(self, step: int) -> None:
        """The state after `step` steps. A collective."""
        self._write(step, self.path(step), "validation", None)
        if self.ema is not None and self.ema.updates:
            note = (
                f"These weights are an exponential moving average of the training's: decay {self.ema.decay:g}, "
                f"{self.ema.updates:,} updates."
            )
            with self.ema.swapped_in():
                self._write(step, self.path(step, "-ema"), "validation_ema", note)

    def _write(self, step: int, path: Path, evaluation: str, note: str | None) -> None:
        if ranks.from_rank_0(path.exists()):
            return
        try:
            check_exportable(self.config.model)
        except ConfigError as error:  # a component of `imports`; the checkpoint has the weights
            if ranks.rank() == 0:
                log.warning("no export of step %d: %s", step, error)
            return
        model = whole_model(self.model, ranks.rank() == 0)
        if model is not None:
            facts = self.metrics.evaluation_at(step, evaluation)
            origin = read_origin_record(self.folder.parent)
            card = report.model_card(self.config, self.plan, self.plan.tokens_before(step), facts, note, origin)
            try:
                self._write_parts(step, model, path.name)
                with alone(model):
                    flexbert.to_hf(model, tokenizer_folder(self.config.data), path, card=card)
            except RunError as error:
                if not outside(self.config.model):
                    raise
                # A part that does not work away from home costs the export, and not the run.
                log.warning("no export of step %d: %s", step, error)
        ranks.barrier()

    def _write_parts(self, step: int, model: FlexBertForMaskedLM, name: str) -> None:
        """What the objective of the last step trains beside the model, to RUN/KIND/NAME: not among the exports, which
        are published and evaluated. Before the model, whose folder says that all is there."""
        phase = self.plan.at(max(step - 1, 0))
        exports = getattr(OBJECTIVES.entries[phase.objective.name], "exports", None)
        for kind, part in ({} if exports is None else exports(model)).items():
            folder = self.folder.parent / kind / name
            folder.parent.mkdir(exist_ok=True)
            flexbert.to_hf(part, tokenizer_folder(self.config.data), folder)
