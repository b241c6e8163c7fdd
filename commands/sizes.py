"""What a run puts on the disk: bytes of a checkpoint and of an export, and of all that is there at once."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from flexbert import FlexBertForMaskedLM
from flexbert.accounting import count_parameters
from recipe.config import RunConfig
from recipe.cost import parameters_beside, parameters_exported
from recipe.phases import PhasePlan
from recipe.slots import OBJECTIVES, OPTIMIZERS
from training.objectives.phases import Objectives
from training.states import NUMBER, state_bytes


@dataclass(frozen=True)
class DiskNeed:
    """Bytes of one checkpoint and of one export, how many there are, and bytes of all. The rest of a run folder (logs,
    a few MB) is left out.

    permanent: checkpoints that are kept for ever: ends of phases, and those of checkpoint.keep_every.
    passing: others that are there at a time: the newest, the best, and the one being written, as an old one goes only
    when that is whole. beside: bytes of what objectives export beside the model, in all.
    """

    checkpoint: int
    export: int
    permanent: int
    passing: int
    exports: int
    beside: int

    @property
    def total(self) -> int:
        return self.checkpoint * (self.permanent + self.passing) + self.export * self.exports + self.beside


def disk_need(config: RunConfig, plan: PhasePlan) -> DiskNeed:
    """What a run takes at its end, when it takes most."""
    averages, exported = int(config.ema is not None), count_parameters(config.model)
    parameters = exported + parameters_beside(config, plan)
    options, exports = config.checkpoint, _exports(config, plan, averages)
    return DiskNeed(
        checkpoint=parameters * NUMBER + state_bytes(config, model_on_meta(config, plan)),
        export=exported * NUMBER,
        permanent=sum(plan.checkpoints(phase, options.keep_every) for phase in plan.phases),
        passing=options.keep + options.keep_best + 1,
        exports=sum(exports),
        beside=sum(
            count * NUMBER * parameters_exported(config, phase)
            for count, phase in zip(exports, plan.phases, strict=True)
        ),
    )


def model_on_meta(config: RunConfig, plan: PhasePlan) -> nn.Module:
    """All that the run trains, without memory. Raises ConfigError, starting with the key, when the optimizer cannot be
    made for it."""
    with torch.device("meta"):
        model = FlexBertForMaskedLM(config.model)
        Objectives(config, plan, model)
        OPTIMIZERS.build(config.optimizer, model=model, lr=plan.phases[0].peak_lr)
    return model


def _exports(config: RunConfig, plan: PhasePlan, averages: int) -> list[int]:
    """How many each phase writes; of step 0, which is the first's, there is no average."""
    if not config.exports_permanent:
        return [1 + averages] * len(plan.phases)
    kept = [plan.checkpoints(phase, config.checkpoint.keep_every) * (1 + averages) for phase in plan.phases]
    return [kept[0] + 1, *kept[1:]]


def already_there(folder: Path) -> int:
    """Bytes that a run folder's checkpoints and exports take now."""
    kinds = {kind for entry in OBJECTIVES.entries.values() for kind in getattr(entry, "export_kinds", ())}
    files = (
        file
        for part in ("checkpoints", "exports", *sorted(kinds))
        for file in (folder / part).rglob("*")
        if file.is_file()
    )
    return sum(file.stat().st_size for file in files)
