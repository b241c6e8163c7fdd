"""Trains the trials of a search, batch by batch, until there are as many as the sweep file wants."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from rich.console import Console

from flexbert_core.schema import ConfigError
from jobs.base import Job, JobExecutor, told
from sweeps.arms import Design, arm_of, difference
from sweeps.cell_jobs import job_of
from sweeps.file import Search
from sweeps.folder import Cell, cell_of, check_trials, write_cells
from sweeps.results import Trial
from sweeps.run_result import read_run
from sweeps.searching import best_of, name_of, propose, read_search, write_search
from sweeps.searching import told as with_loss
from training.checkpoints.files import list_checkpoints, tokens_of
from training.folder import RunFolder
from training.signals import EXIT_PREEMPTED

_TRIES = 3


def look(design: Design, search: Search, executor: JobExecutor, console: Console) -> bool:
    """Whether the search has ended, with its best trial chosen as an arm.

    A trial whose run has diverged is a result and is not tried again. Any other end of a run (a signal, a node that
    died, a full disk) says nothing about its values: the search goes on there at the next call. One that has failed
    so _TRIES times in a row without a checkpoint in between counts as failed: its values want more memory than there
    is, say. What is wrong with the config (exit code 2) or asked to stop (85) is not counted.

    Raises ConfigError for trials that were trained otherwise than the sweep file now says.
    """
    check_trials(design, search)
    trials = read_search(design.folder, search)
    say = partial(console.print, soft_wrap=True, markup=False)
    while True:
        waiting = [trial for trial in trials if trial.state == "running"]
        if not waiting and len(trials) >= search.trials:
            break
        # Those of a batch that a kill has left: it is filled up as it would have been, before anything is told.
        first = waiting[0].number if waiting else len(trials)
        while len(trials) < min(first + search.batch, search.trials):
            trials.append(propose(search, trials))
            write_search(design.folder, search, trials)
        ended = _train(design, trials, executor, say)
        write_search(design.folder, search, trials)
        if not ended:
            return False
    best = best_of([trial for trial in trials if trial.loss is not None and _differs(design, trial)])
    if best is None:
        why = f"see {design.folder / 'search.json'} for why"
        say(f"search: none of {len(trials)} trials differs from the baseline and has a loss: {why}")
        return False
    trials[best.number] = replace(best, chosen=True)
    write_search(design.folder, search, trials)
    say(f"search: {name_of(best.number)} of {len(trials)} trials is the best, loss {best.loss:.4f}: an arm from now on")
    return True


def _differs(design: Design, trial: Trial) -> bool:
    """From the baseline, whose own values may be among those to choose from."""
    arm = arm_of(design, name_of(trial.number), trial.changes, may_be_baseline=True)
    return bool(difference(arm.config, design.baseline.config))


def _train(design: Design, trials: list[Trial], executor: JobExecutor, say: Callable[[str], None]) -> bool:
    """The running ones, and note what came of them all; False when nothing can be said of one yet."""
    assert design.sweep.search is not None
    cells: dict[int, Cell] = {}
    for trial in trials:
        if trial.state == "running":
            try:
                arm = arm_of(design, name_of(trial.number), trial.changes, may_be_baseline=True)
            except ConfigError as error:  # these values together are no model, say
                say(f"warning: {error}")
                trials[trial.number] = with_loss(trial, None, str(error))
                continue
            cells[trial.number] = cell_of(design, arm, design.sweep.search.train_seed)
    write_cells(list(cells.values()))
    codes: dict[str, int | None] = {}
    jobs = [job_of(cell, design.sweep.processes) for cell in cells.values() if not cell.is_finished]
    show = told(jobs, say, executor.begun)

    def changed(job: Job, code: int | None) -> None:
        codes[job.name] = code
        show(job, code)

    if jobs:
        executor.run(jobs, changed)
    why: dict[int, str] = {}
    for number, cell in cells.items():
        code = codes.get(cell.name)
        if cell.is_finished or code is None:
            continue
        if RunFolder(cell.config.folder).divergence.exists():
            why[number] = "it diverged"
        elif code not in (0, 2, EXIT_PREEMPTED):
            died = (*trials[number].died_at, _newest(cell))
            trials[number] = replace(trials[number], died_at=died)
            if died[-_TRIES:] == died[-1:] * _TRIES:
                why[number] = f"it ended {_TRIES} times at {died[-1]:,} tokens (exit code {code})"
    left = [cell.name for number, cell in cells.items() if not cell.is_finished and number not in why]
    if left:
        say(f"search: {', '.join(left)} did not finish: the same command goes on there")
        return False
    for number, cell in cells.items():
        if not cell.is_finished:
            trials[number] = with_loss(trials[number], None, f"{why[number]}: see {cell.log}")
            continue
        run = read_run(cell.config.folder)
        loss = run.summary["validation"]["loss"] if run.documents is None else run.documents.loss
        trials[number] = with_loss(trials[number], loss)
    return True


def _newest(cell: Cell) -> int:
    """Tokens of the run's newest checkpoint; 0 without one."""
    return max(map(tokens_of, list_checkpoints(RunFolder(cell.config.folder).checkpoints)), default=0)
