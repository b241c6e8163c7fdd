"""Trains what is missing of a sweep: each run a job, which goes on from its checkpoint when it was begun before."""

from collections.abc import Mapping, Sequence
from functools import partial

from rich.console import Console

from flexbert_core.durable import lock
from jobs.base import JOBS, JobExecutor, told
from sweeps.arms import Design, expand
from sweeps.cell_jobs import job_of
from sweeps.file import Stop
from sweeps.folder import Cell, cells_of, write_sweep
from sweeps.looking import look
from sweeps.results import Judged
from sweeps.searching import check_installed
from sweeps.stopping import judge, losses_at, passed, read_judged, rung_tokens, unranked, write_judged


def run_sweep(design: Design, console: Console) -> bool:
    """Whether all runs are finished in the end, or stopped by the sweep's rule; one that fails stops no other, and the
    next call tries it again.

    With rungs every arm is trained up to the first and paused, then those that go on up to the next. No job ever has to
    be ended for it, and a run that goes on does so exactly: so it works alike under every executor, and after a kill.

    Raises ConfigError before anything is trained for runs that have begun otherwise and for executors that cannot run
    them, RunError when another process trains this sweep.
    """
    executor: JobExecutor = JOBS.build(design.sweep.executor)
    executor.check()
    if design.sweep.search is not None:
        check_installed()
    cells = cells_of(design)
    design.folder.mkdir(parents=True, exist_ok=True)
    with lock(design.folder / ".lock", design.folder, "training this sweep"):
        write_sweep(design, cells)
        if design.sweep.search is not None:
            if not look(design, design.sweep.search, executor, console):
                return False
            design = expand(design.file, design.sweep)  # with what was found
            cells = cells_of(design)
        judged = (
            [] if design.sweep.stop is None else read_judged(design.folder, design.sweep.stop, design.baseline.name)
        )
        write_sweep(design, cells)
        training = _Training(design, cells, executor, console, judged)
        done = sum(cell.is_finished for cell in cells)
        stopped = len(training.stopped)
        console.print(
            f"{design.folder}: {len(design.arms)} arms x {len(design.sweep.seeds)} seeds, "
            f"{done} of {len(cells)} runs finished{f', {stopped} arms stopped' if stopped else ''}; "
            f"`main.py sweep status {design.folder}` shows where it stands",
            soft_wrap=True,
        )
        if design.sweep.stop is not None:
            training.climb(design.sweep.stop)
        training.finish()
    if training.failed:
        names = ", ".join(cell.name for cell in cells if cell.name in training.failed)
        console.print(
            f"{len(training.failed)} of {len(cells)} runs are not finished: {names}: the same command tries them again",
            soft_wrap=True,
        )
    return not training.failed


class _Training:
    """One call's work on a sweep."""

    def __init__(
        self, design: Design, cells: Sequence[Cell], executor: JobExecutor, console: Console, judged: list[Judged]
    ) -> None:
        self.design, self.cells, self.executor, self.console = design, cells, executor, console
        self.judged = judged
        self.failed = set[str]()
        """Names of runs."""

    @property
    def stopped(self) -> set[str]:
        return {each.arm for each in self.judged if not each.kept}

    @property
    def _going(self) -> list[Cell]:
        """Of arms that were not stopped, and of which nothing failed in this call: an arm goes on as a whole."""
        out = self.stopped | {cell.arm for cell in self.cells if cell.name in self.failed}
        return [cell for cell in self.cells if cell.arm not in out]

    def climb(self, stop: Stop) -> None:
        """Up to the last rung, with a decision at each."""
        tokens = {arm.name: rung_tokens(stop, arm.config) for arm in self.design.arms}
        for rung, share in enumerate(stop.rungs, 1):
            at = {arm: each[rung - 1] for arm, each in tokens.items()}
            self._train([cell for cell in self._going if not passed(cell.config, at[cell.arm])], at)
            self.failed |= {cell.name for cell in self._going if not passed(cell.config, at[cell.arm])}
            arms = dict.fromkeys(cell.arm for cell in self._going)
            runs = {arm: {cell.seed: cell.config for cell in self.cells if cell.arm == arm} for arm in arms}
            losses = {arm: found for arm in arms if (found := losses_at(runs[arm], at[arm])) is not None}
            if out := [arm for arm in unranked(runs, at) if arm != self.design.baseline.name]:
                self.console.print(
                    f"rung {rung}, {share:.3g} of the budget: not ranked, and not stopped there: {', '.join(out)}: "
                    "trained beyond it before it was asked",
                    soft_wrap=True,
                    markup=False,
                )
            if new := judge(stop, rung, losses, self.design.baseline.name, self.judged):
                self.judged += new
                write_judged(self.design.folder, stop, self.judged)
                said = "; ".join(
                    f"{word}: {', '.join(each.arm for each in new if each.kept == kept) or 'none'}"
                    for kept, word in ((True, "go on"), (False, "stopped"))
                )
                self.console.print(f"rung {rung}, {share:.3g} of the budget: {said}", soft_wrap=True, markup=False)

    def finish(self) -> None:
        """What is left of the arms that go on."""
        left = [cell for cell in self._going if not cell.is_finished]
        self._train(left, {})
        out = self.stopped
        self.failed |= {cell.name for cell in self.cells if cell.arm not in out and not cell.is_finished}

    def _train(self, cells: Sequence[Cell], until: Mapping[str, int]) -> None:
        """until: tokens by arm; of an arm without, to the end."""
        processes = self.design.sweep.processes
        jobs = [job_of(cell, processes, until.get(cell.arm)) for cell in cells]
        if jobs:
            self.executor.run(jobs, told(jobs, partial(self.console.print, soft_wrap=True), self.executor.begun))
