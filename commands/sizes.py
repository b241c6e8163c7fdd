"""What a run puts on the disk: bytes of a checkpoint and of an export, and of all that is there at once."""

from dataclasses import dataclass
from pathlib import Path

from flexbert.accounting import count_parameters
from recipe.config import RunConfig
from recipe.phases import PhasePlan

_NUMBER = 4  # bytes: everything is saved in float32, whatever the steps were computed in
_MOMENTS = 2  # of a weight, in the optimizer's state; muon has one for matrices and takes less


@dataclass(frozen=True)
class DiskNeed:
    """Bytes of one checkpoint and of one export, how many there are, and bytes of all. The rest of a run folder (logs,
    a few MB) is left out.

    permanent: checkpoints that are kept for ever: ends of phases, and those of checkpoint.keep_every.
    passing: others that are there at a time: the newest, the best, and the one being written, as an old one goes only
    when that is whole.
    """

    checkpoint: int
    export: int
    permanent: int
    passing: int
    exports: int

    @property
    def total(self) -> int:
        return self.checkpoint * (self.permanent + self.passing) + self.export * self.exports


def disk_need(config: RunConfig, plan: PhasePlan) -> DiskNeed:
    """What a run takes at its end, when it takes most."""
    parameters, averages = count_parameters(config.model), int(config.ema is not None)
    options = config.checkpoint
    return DiskNeed(
        checkpoint=parameters * _NUMBER * (1 + _MOMENTS + averages),
        export=parameters * _NUMBER,
        permanent=sum(plan.checkpoints(phase, options.keep_every) for phase in plan.phases),
        passing=options.keep + options.keep_best + 1,
        exports=_exports(config, plan, averages),
    )


def _exports(config: RunConfig, plan: PhasePlan, averages: int) -> int:
    """How many are written; of step 0 there is no average."""
    if not config.exports_permanent:
        return len(plan.phases) * (1 + averages)
    kept = sum(plan.checkpoints(phase, config.checkpoint.keep_every) for phase in plan.phases)
    return kept * (1 + averages) + 1


def already_there(folder: Path) -> int:
    """Bytes that a run folder's checkpoints and exports take now."""
    files = (file for part in ("checkpoints", "exports") for file in (folder / part).rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in files)
