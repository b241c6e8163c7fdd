"""The tables of a report, as values: the page, Markdown and LaTeX show the same."""

from sweeps.report.cells import (
    Cell,
    Column,
    Table,
    difference,
    differs,
    interval,
    interval_column,
    number,
    on_other_text,
    said,
    short,
    table,
)
from sweeps.report.cost_tables import cost_of_loss, equal_cost
from sweeps.report.scores import score_table
from sweeps.report.subject import Subject, seen
from sweeps.results import Stops, SweepResult
from sweeps.searching import name_of
from sweeps.statistics import DOCUMENTS, OTHER_TEXT, documents, final_losses, other_text, verdicts


def tables(subject: Subject) -> list[Table]:
    """All of a report; what there is nothing to say in is left out."""
    if subject.sweep is None:
        found = [_runs(subject)]
    else:
        sweep = subject.sweep
        found = [
            _verdicts(subject, sweep),
            _search(sweep),
            _rungs(sweep),
            equal_cost(subject, sweep),
            cost_of_loss(sweep),
            _documents(sweep),
            score_table(sweep),
        ]
    return [each for each in [*found, _mixture(subject)] if each.rows]


def _verdicts(subject: Subject, sweep: SweepResult) -> Table:
    losses, source = final_losses(sweep)
    others = other_text(sweep) if source != DOCUMENTS else []
    of = {each.arm: each for each in verdicts(sweep)}
    columns = [
        Column("arm", False),
        Column("verdict", False, "At 0.05, of the corrected p value."),
        Column("difference", hint="Arm less baseline, with its 95 % t interval over seeds, for this comparison alone."),
        interval_column(),
        Column("p (Holm)", hint="Corrected for the number of arms."),
        Column("loss", hint="Final held-out loss, mean over seeds, nats per masked token. Smaller is better."),
        Column("visible", hint="The difference that this noise and these seeds would show in 80 % of sweeps."),
        Column("parameters"),
        Column("differs in", False, "Config keys that differ from the baseline, adjusted ones in brackets."),
    ]
    rows = []
    for arm in subject.arms:
        found = of.get(arm.name)
        values = [losses[arm.name, seed] for seed in sweep.seeds]
        known = [value for value in values if value is not None]
        mean = number(sum(known) / len(known) if known and len(known) == len(values) else None)
        tail = [number(arm.parameters, ","), differs(arm)]
        if found is None:
            nothing = Cell("")
            verdict = Cell("baseline", "baseline", kind="baseline")
            rows.append([Cell(arm.name, arm.name), verdict, nothing, nothing, nothing, mean, nothing, *tail])
            continue
        told = said(found) + (f" ({OTHER_TEXT})" if arm.name in others else "")
        verdict = Cell(told, found.verdict, kind=found.verdict.replace(" ", "-"))
        test = [difference(found), interval(found.low, found.high), number(found.corrected, ".3g")]
        rows.append([Cell(arm.name, arm.name), verdict, *test, mean, number(found.visible), *tail])
    welch = any(not each.paired for each in of.values())
    tests = "Paired t tests" + ("; Welch's where batches or masks were not the same" if welch else "")
    seeds = f"{len(sweep.seeds)} seed{'s' * (len(sweep.seeds) != 1)}"
    note = f"Baseline {sweep.baseline}, {seeds}; the loss is that of {source}. {tests}, over seeds."
    if others:
        note += f" {on_other_text(others)} Their differences are not of the model alone."
    if chosen := _chosen(sweep):
        note += f" {chosen}"
    if count := subject.left_over:
        note += (
            f" {count} finished run{'s are' if count > 1 else ' is'} in {sweep.folder / 'runs'} of arms or seeds that "
            "the sweep file no longer has: p values are not corrected for them."
        )
    if sweep.stopped:
        note += (
            " Stopped arms have no final loss and are compared with nothing; they count in Holm's correction, so the "
            "verdicts of the others hold although the others were chosen."
        )
    return table("verdicts", "Verdicts over seeds", columns, rows, note)


def _rungs(sweep: SweepResult) -> Table:
    stops = sweep.stops
    found = {(each.arm, each.rung): each for each in (stops.judged if stops else ())}
    rungs = stops.rungs if stops else ()
    rows = []
    for arm in dict.fromkeys(arm for arm, _ in found):
        row = [Cell(arm, arm)]
        for rung in range(1, len(rungs) + 1):
            one = found.get((arm, rung))
            if one is None:
                row.append(Cell("-"))
                continue
            values = [one.losses[seed] for seed in _common(stops, rung)]
            known = [value for value in values if value is not None]
            loss = number(sum(known) / len(known) if known and len(known) == len(values) else None)
            word = "goes on" if one.kept else "stopped"
            row.append(Cell(f"{loss.text} {word}", loss.value, csv=(loss.value, word)))
        rows.append(row)
    columns = [
        Column("arm", False),
        *(
            Column(f"rung {n}: {share:.3g} of the budget", csv=(f"rung {n}: loss", f"rung {n}"))
            for n, share in enumerate(rungs, 1)
        ),
    ]
    note = (
        "Held-out loss, mean over the seeds that all arms have there, where arms were ranked and the best went on; the "
        "baseline always does. These are losses under way: an arm that is slow at first may have been stopped wrongly."
    )
    return table("rungs", "Where arms were stopped", columns, rows, note)


def _common(stops: Stops | None, rung: int) -> list[int]:
    """Seeds of which every arm that came to the rung has a loss: those that arms were ranked over."""
    there = [set(each.losses) for each in (stops.judged if stops else ()) if each.rung == rung]
    return sorted(set.intersection(*there)) if there else []


def _chosen(sweep: SweepResult) -> str:
    """How arms of a search came to be arms."""
    search = sweep.search
    if search is None:
        return ""
    names = [name_of(trial.number) for trial in search.trials if trial.chosen]
    if not names:
        done = sum(trial.state != "running" for trial in search.trials)
        return f"The search is under way: {done} of {search.wanted} trials are done, and none is an arm yet."
    return (
        f"{', '.join(names)} had the lowest loss of {len(search.trials)} trials with seed {search.seed}. Its runs here "
        "have other seeds, so that being chosen does not flatter it over seeds; the held-out documents are the same."
    )


def _search(sweep: SweepResult) -> Table:
    trials = sorted(sweep.search.trials if sweep.search else (), key=lambda trial: (trial.loss is None, trial.loss))
    rows = []
    for trial in trials:
        values = "  ".join(f"{path}={short(value)}" for path, value in trial.changes.items())
        state = "chosen" if trial.chosen else trial.state + (f": {trial.why}" if trial.why else "")
        name = name_of(trial.number)
        rows.append([Cell(name, name), number(trial.loss), Cell(state, state), Cell(values, values)])
    columns = [Column("trial", False), Column("loss"), Column("state", False), Column("values", False)]
    note = (
        "Held-out loss of one run each. The lowest of many is low by luck, too: it is no estimate of what these values "
        "give, and trials are compared with nothing. The verdict is on the chosen arm's own runs."
    )
    return table("search", "Trials of the search", columns, rows, note)


def _documents(sweep: SweepResult) -> Table:
    rows = []
    for arm in sweep.arms:
        for seed in sweep.seeds:
            if arm.name == sweep.baseline:
                continue
            ours, theirs = sweep.runs[arm.name, seed], sweep.runs[sweep.baseline, seed]
            if ours.state != "finished" or theirs.state != "finished":
                continue
            if (one := documents(ours, theirs)) is not None:
                bar = (one.low, one.difference, one.high)
                gap = Cell(f"{one.difference:+.4f}", one.difference, bar)
                span = interval(one.low, one.high)
                rows.append([Cell(arm.name, arm.name), number(seed, "d"), gap, span, number(one.documents, ",")])
    columns = [
        Column("arm", False),
        *(Column("seed"), Column("difference"), interval_column(), Column("documents")),
    ]
    note = (
        "Two trained models over held-out documents (bootstrap by document). This is about texts: it says nothing "
        "about another seed, and no verdict uses it."
    )
    return table("documents", "Within one seed, over documents", columns, rows, note)


def _runs(subject: Subject) -> Table:
    columns = [Column("run", False), Column("differs in", False), Column("state", False), Column("tokens")]
    columns += [Column("training loss"), Column("held-out loss"), Column("tokens/s")]
    rows = []
    for arm in subject.arms:
        for run in subject.runs[arm.name]:
            losses = [line for line in run.lines if line.get("loss") is not None]
            held = [line["validation"]["loss"] for line in run.lines if "validation" in line]
            last = losses[-1] if losses else {}
            rows.append(
                [
                    Cell(arm.name, arm.name),
                    differs(arm),
                    Cell(run.state, run.state),
                    number(run.lines[-1]["tokens"], ","),
                    number(last.get("loss")),
                    number(held[-1] if held else None),
                    number(last.get("tokens_per_second"), ",.0f"),
                ]
            )
    note = "Runs by themselves: nothing is compared over seeds, so there are no verdicts." if len(rows) > 1 else ""
    return table("runs", "Runs" if len(rows) > 1 else "Run", columns, rows, note)


def _mixture(subject: Subject) -> Table:
    rows = []
    for arm in subject.arms:
        for run in subject.runs[arm.name]:
            counts = seen(run)
            total = sum(each["tokens"] for each in counts.values())
            for name, each in counts.items():
                share = each["tokens"] / total if total else None
                repeats = each["repeated_tokens"] / each["tokens"] if each["tokens"] else None
                cells = [Cell(arm.name, arm.name), number(run.seed, "d"), Cell(name, name), number(each["tokens"], ",")]
                rows.append([*cells, number(share, ".2%"), number(repeats, ".2%")])
    columns = [Column("arm" if subject.sweep else "run", False), Column("seed"), Column("stream", False)]
    columns += [Column("tokens"), Column("share"), Column("repeated", hint="Tokens of documents seen before.")]
    return table("mixture", "Mixture and repeats so far", columns, rows, "From the newest line of each run's ledger.")
