"""The tables of a report, as values: the page, Markdown and LaTeX show the same."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sweeps.budgets import at_equal, reaching
from sweeps.report.subject import Subject, seen
from sweeps.results import Arm, RunResult, SweepResult
from sweeps.searching import name_of
from sweeps.statistics import (
    DOCUMENTS,
    OTHER_TEXT,
    Comparison,
    compare_in,
    documents,
    final_losses,
    other_text,
    verdicts,
    why_missing,
)

_COSTS = {"tokens": "tokens", "flops": "FLOPs", "hours": "hours"}


@dataclass(frozen=True)
class Cell:
    """text: for people. value: to sort by; None sorts last. bar: low, middle and high of an interval to draw."""

    text: str
    value: float | str | None = None
    bar: tuple[float, float, float] | None = None
    kind: str = ""
    """A verdict's name, for its colour: an interval alone has none."""


@dataclass(frozen=True)
class Column:
    head: str
    numeric: bool = True
    hint: str = ""


@dataclass(frozen=True)
class Table:
    """key: the name of its CSV file. note: how to read it."""

    key: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    reach: float = 0.0
    """The largest distance from zero of any bar."""


def number(value: float | None, form: str = ".4f") -> Cell:
    """A dash for what is not known or not finite."""
    value = None if value is None or not math.isfinite(value) else value
    return Cell("-" if value is None else format(value, form), value)


def _table(key: str, title: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], note: str = "") -> Table:
    ends = [abs(end) for row in rows for cell in row if cell.bar for end in cell.bar]
    return Table(key, title, columns, rows, note, max(ends, default=0.0))


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
            _equal(subject, sweep),
            _reaching(sweep),
            _documents(sweep),
            _scores(sweep),
        ]
    return [table for table in [*found, _mixture(subject)] if table.rows]


def _verdicts(subject: Subject, sweep: SweepResult) -> Table:
    losses, source = final_losses(sweep)
    others = other_text(sweep) if source != DOCUMENTS else []
    of = {each.arm: each for each in verdicts(sweep)}
    columns = [
        Column("arm", False),
        Column("verdict", False, "At 0.05, of the corrected p value."),
        Column("difference", hint="Arm less baseline, with its 95 % t interval over seeds, for this comparison alone."),
        Column("95 % interval"),
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
        tail = [number(arm.parameters, ","), _differs(arm)]
        if found is None:
            nothing = Cell("")
            verdict = Cell("baseline", "baseline", kind="baseline")
            rows.append([Cell(arm.name, arm.name), verdict, nothing, nothing, nothing, mean, nothing, *tail])
            continue
        said = _said(found) + (f" ({OTHER_TEXT})" if arm.name in others else "")
        verdict = Cell(said, found.verdict, kind=found.verdict.replace(" ", "-"))
        interval = Cell(_interval(found.low, found.high), found.low)
        test = [_difference(found), interval, number(found.corrected, ".3g")]
        rows.append([Cell(arm.name, arm.name), verdict, *test, mean, number(found.visible), *tail])
    welch = any(not each.paired for each in of.values())
    tests = "Paired t tests" + ("; Welch's where batches or masks were not the same" if welch else "")
    seeds = f"{len(sweep.seeds)} seed{'s' * (len(sweep.seeds) != 1)}"
    note = f"Baseline {sweep.baseline}, {seeds}; the loss is that of {source}. {tests}, over seeds."
    if others:
        note += f" {_on_other_text(others)} Their differences are not of the model alone."
    if chosen := _chosen(sweep):
        note += f" {chosen}"
    if sweep.stopped:
        note += (
            " Stopped arms have no final loss and are compared with nothing; they count in Holm's correction, so the "
            "verdicts of the others hold although the others were chosen."
        )
    return _table("verdicts", "Verdicts over seeds", columns, rows, note)


def _on_other_text(arms: Sequence[str]) -> str:
    return f"Not on the same held-out text as the baseline (other numbers of masked tokens): {', '.join(arms)}."


def _under_way(sweep: SweepResult) -> str:
    """What loss the tables of costs are of, and which arms they leave out."""
    source, others = final_losses(sweep)[1], other_text(sweep)
    note = " The loss is that of each run's own evaluations"
    note += f", not the loss on {source} that verdicts are of." if source == DOCUMENTS else "."
    return note + (f" {_on_other_text(others)} They are left out." if others else "")


def _rungs(sweep: SweepResult) -> Table:
    stops = sweep.stops
    found = {(each.arm, each.rung): each for each in (stops.judged if stops else ())}
    rungs = stops.rungs if stops else ()
    rows = []
    for arm in dict.fromkeys(arm for arm, _ in found):
        row = [Cell(arm, arm)]
        for rung in range(1, len(rungs) + 1):
            one = found.get((arm, rung))
            values = [] if one is None else [value for value in one.losses.values() if value is not None]
            mean = sum(values) / len(values) if one is not None and values and len(values) == len(one.losses) else None
            loss = number(mean)
            row.append(loss if one is None else Cell(f"{loss.text} {'goes on' if one.kept else 'stopped'}", mean))
        rows.append(row)
    columns = [
        Column("arm", False),
        *(Column(f"rung {n}: {share:.3g} of the budget") for n, share in enumerate(rungs, 1)),
    ]
    note = (
        "Held-out loss, mean over seeds, where arms were ranked and the best went on; the baseline always does. These "
        "are losses under way: an arm that is slow at first may have been stopped wrongly."
    )
    return _table("rungs", "Where arms were stopped", columns, rows, note)


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
        values = "  ".join(f"{path}={_short(value)}" for path, value in trial.changes.items())
        state = "chosen" if trial.chosen else trial.state + (f": {trial.why}" if trial.why else "")
        name = name_of(trial.number)
        rows.append([Cell(name, name), number(trial.loss), Cell(state, state), Cell(values, values)])
    columns = [Column("trial", False), Column("loss"), Column("state", False), Column("values", False)]
    note = (
        "Held-out loss of one run each. The lowest of many is low by luck, too: it is no estimate of what these values "
        "give, and trials are compared with nothing. The verdict is on the chosen arm's own runs."
    )
    return _table("search", "Trials of the search", columns, rows, note)


def _said(found: Comparison) -> str:
    if found.verdict == "incomplete":
        return (
            "incomplete: "
            + ", ".join(f"{arm} seed {seed} {why}" for arm, seed, why in found.missing[:3])
            + (f" and {len(found.missing) - 3} more" if len(found.missing) > 3 else "")
        )
    if found.verdict == "stopped":
        return found.missing[0][2]
    if found.verdict == "one seed":
        return "one seed: no verdict"
    if found.verdict == "not tested":
        return "not tested: every seed gives the same difference"
    if found.verdict == "no difference shown" and found.visible is None:
        return "no difference shown: equal for every seed"
    return found.verdict + ("" if found.paired else " (unpaired)")


def _difference(found: Comparison) -> Cell:
    bar = None if found.low is None or found.high is None or found.mean is None else (found.low, found.mean, found.high)
    text = "-" if found.mean is None else f"{found.mean:+.4f}"
    return Cell(text, found.mean, bar, found.verdict if found.verdict in ("better", "worse") else "")


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"[{low:+.4f}, {high:+.4f}]"


def _differs(arm: Arm) -> Cell:
    parts = [f"{key}={_short(value)}" for key, value in arm.changes.items()]
    parts += [f"({key}={_short(value)})" for key, value in arm.adjusted.items()]
    text = "  ".join([*parts, *arm.notes])
    return Cell(text, text)


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_short(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_short, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _equal(subject: Subject, sweep: SweepResult) -> Table:
    found = at_equal(sweep)
    columns = [Column("arm", False)]
    for each in found:
        budget = "unknown" if each.budget is None else f"{each.budget:.4g}"
        columns += [Column(f"at {budget} {_COSTS[each.axis]}"), Column("95 % interval"), Column("p (Holm)")]
    of = {(each.axis, one.arm): one for each in found for one in each.comparisons}
    rows = []
    for arm in subject.arms:
        if arm.name != sweep.baseline:
            row = [Cell(arm.name, arm.name)]
            for each in found:
                one = of[each.axis, arm.name]
                row += [_difference(one), Cell(_interval(one.low, one.high), one.low), number(one.corrected, ".3g")]
            rows.append(row)
    note = (
        "Difference from the baseline where all finished runs have spent as much, on straight lines between "
        "evaluations. Hours are those of training steps. Each cost is a family of comparisons of its own."
    ) + _under_way(sweep)
    return _table("equal-cost", "Loss at equal cost", columns, rows, note)


def _reaching(sweep: SweepResult) -> Table:
    of = {(each.arm, each.axis): each for each in reaching(sweep)}
    rows = []
    for arm in dict.fromkeys(name for name, _ in of):
        row = [Cell(arm, arm)]
        for axis in _COSTS:
            one = of[arm, axis]
            text = f"reached by {one.reached} of {one.seeds} seeds" if one.share is None else f"{one.share:.1%}"
            row.append(Cell(one.why or text, one.share))
        rows.append(row)
    columns = [Column("arm", False), *(Column(name) for name in _COSTS.values())]
    note = "What the arm had spent when it reached the baseline's final held-out loss, as a share of the baseline's."
    note += _under_way(sweep)
    return _table("reaching", "Cost of the baseline's loss", columns, rows, note)


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
                interval = Cell(_interval(one.low, one.high), one.low)
                rows.append([Cell(arm.name, arm.name), number(seed, "d"), gap, interval, number(one.documents, ",")])
    columns = [
        Column("arm", False),
        *(Column(name) for name in ("seed", "difference", "95 % interval", "documents")),
    ]
    note = (
        "Two trained models over held-out documents (bootstrap by document). This is about texts: it says nothing "
        "about another seed, and no verdict uses it."
    )
    return _table("documents", "Within one seed, over documents", columns, rows, note)


def last_scores(run: RunResult) -> dict[str, float]:
    """The newest value of every score of downstream evaluations, made beside the run or by it."""
    found: dict[str, float] = {}
    for line in sorted(score_lines(run), key=lambda line: line["tokens"]):
        found |= line["scores"]
    return found


def score_lines(run: RunResult) -> list[dict[str, Any]]:
    """tokens, and scores by `EVALUATION NAME`."""
    found = []
    for line in run.scores:
        scores = {f"{line['evaluation']} {key}": value for key, value in line.get("scores", {}).items()}
        if scores:
            found.append({"tokens": line["tokens"], "scores": scores})
    for line in run.lines:
        scores = {}
        for name, made in line.get("evaluations", {}).items():
            if isinstance(made, Mapping):
                plain = {key: value for key, value in made.items() if isinstance(value, int | float)}
                scores |= {f"{name} {key}": value for key, value in plain.items()}
        if scores:
            found.append({"tokens": line["tokens"], "scores": scores})
    return found


def _scores(sweep: SweepResult) -> Table:
    finals = {cell: last_scores(run) for cell, run in sweep.runs.items() if run.state == "finished"}
    why = why_missing(sweep)
    rows = []
    for name in sorted({name for scores in finals.values() for name in scores}):
        values = {cell: finals.get(cell, {}).get(name) for cell in sweep.runs}
        reasons = {cell: "has no such score" if cell in finals else why[cell] for cell in values}
        for one in compare_in(sweep, values, reasons):
            ours = [values[one.arm, seed] for seed in sweep.seeds]
            known = [value for value in ours if value is not None]
            mean = sum(known) / len(known) if known and len(known) == len(ours) else None
            said = {"better": "lower", "worse": "higher"}.get(one.verdict, _said(one))
            cells = [
                replace(_difference(one), kind=""),
                Cell(_interval(one.low, one.high), one.low),
                number(one.corrected, ".3g"),
            ]
            verdict = Cell(said, said)
            rows.append([Cell(name, name), Cell(one.arm, one.arm), number(mean), *cells, verdict])
    columns = [Column("score", False), Column("arm", False), Column("mean"), Column("difference")]
    columns += [Column("95 % interval"), Column("p (Holm)"), Column("shown", False)]
    note = "The newest scores of each finished run. Whether higher is better depends on the score. Each is a family."
    return _table("scores", "Downstream scores", columns, rows, note)


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
                    _differs(arm),
                    Cell(run.state, run.state),
                    number(run.lines[-1]["tokens"], ","),
                    number(last.get("loss")),
                    number(held[-1] if held else None),
                    number(last.get("tokens_per_second"), ",.0f"),
                ]
            )
    note = "Runs by themselves: nothing is compared over seeds, so there are no verdicts." if len(rows) > 1 else ""
    return _table("runs", "Runs" if len(rows) > 1 else "Run", columns, rows, note)


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
    return _table("mixture", "Mixture and repeats so far", columns, rows, "From the newest line of each run's ledger.")
