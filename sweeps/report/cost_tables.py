"""The tables of a report on what losses cost."""

from dataclasses import replace
from typing import TypeGuard

from sweeps.budgets import at_equal, reaching
from sweeps.report.cells import Cell, Column, Table, difference, interval, interval_column, number, on_other_text, table
from sweeps.report.subject import Subject
from sweeps.results import SweepResult
from sweeps.statistics import DOCUMENTS, final_losses, other_text

_COSTS = {"tokens": "tokens", "flops": "FLOPs", "hours": "hours"}


def equal_cost(subject: Subject, sweep: SweepResult) -> Table:
    found = at_equal(sweep)
    columns = [Column("arm", False)]
    for each in found:
        budget = "unknown" if each.budget is None else f"{each.budget:.4g}"
        at, of = f"at {budget} {_COSTS[each.axis]}", f"{_COSTS[each.axis]}: "
        columns += [
            Column(at, csv=(f"difference {at}", f"{of}share of the arm's own")),
            interval_column(of),
            Column("p (Holm)", csv=(f"{of}p (Holm)",)),
        ]
    of = {(each.axis, one.arm): one for each in found for one in each.comparisons}
    rows = []
    for arm in subject.arms:
        if arm.name != sweep.baseline:
            row = [Cell(arm.name, arm.name)]
            for each in found:
                one = of[each.axis, arm.name]
                row.append(_read_at(difference(one), each.shares.get(arm.name)))
                row += [interval(one.low, one.high), number(one.corrected, ".3g")]
            rows.append(row)
    note = (
        "Difference from the baseline where all finished runs have spent as much, on straight lines between "
        "evaluations. Hours are those of training steps. Each cost is a family of comparisons of its own. An arm that "
        "had spent more by its own end is read before it, at the share in brackets, where its learning rate has not "
        "decayed yet."
    )
    own = {_COSTS[each.axis]: each.shares.get(sweep.baseline) for each in found}
    early = [f"{share:.0%} of its {cost}" for cost, share in own.items() if _is_early(share)]
    note += f" The baseline is read at {' and '.join(early)}." if early else ""
    note += _under_way(sweep)
    return table("equal-cost", "Loss at equal cost", columns, rows, note)


def _is_early(share: float | None) -> TypeGuard[float]:
    """Hours of runs that did the same differ by less."""
    return share is not None and share < 0.99


def _read_at(cell: Cell, share: float | None) -> Cell:
    text = f"{cell.text} (at {share:.0%})" if cell.value is not None and _is_early(share) else cell.text
    return replace(cell, text=text, csv=(cell.value, share))


def cost_of_loss(sweep: SweepResult) -> Table:
    of = {(each.arm, each.axis): each for each in reaching(sweep)}
    rows = []
    for arm in dict.fromkeys(name for name, _ in of):
        row = [Cell(arm, arm)]
        for axis in _COSTS:
            one = of[arm, axis]
            text = f"reached by {one.reached} of {one.seeds} seeds" if one.share is None else f"{one.share:.1%}"
            row.append(Cell(one.why or text, one.share, csv=(one.share, None if one.why else one.reached)))
        rows.append(row)
    columns = [Column("arm", False)]
    columns += [Column(name, csv=(f"{name}: share", f"{name}: seeds that reached it")) for name in _COSTS.values()]
    note = "What the arm had spent when it reached the baseline's final held-out loss, as a share of the baseline's."
    note += _under_way(sweep)
    return table("reaching", "Cost of the baseline's loss", columns, rows, note)


def _under_way(sweep: SweepResult) -> str:
    """What loss the tables of costs are of, and which arms they leave out."""
    source, others = final_losses(sweep)[1], other_text(sweep)
    note = " The loss is that of each run's own evaluations"
    note += f", not the loss on {source} that verdicts are of." if source == DOCUMENTS else "."
    return note + (f" {on_other_text(others)} They are left out." if others else "")
