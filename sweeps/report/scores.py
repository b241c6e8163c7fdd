"""Scores of downstream evaluations, and the table of them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sweeps.report.cells import Cell, Column, Table, difference, interval, interval_column, number, said, table
from sweeps.results import RunResult, SweepResult
from sweeps.statistics import compare_in, why_missing

_VERDICTS = "held_out_documents loss"  # is what verdicts are of, and no family beside them


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


def score_table(sweep: SweepResult) -> Table:
    finals = {cell: last_scores(run) for cell, run in sweep.runs.items() if run.state == "finished"}
    why = why_missing(sweep)
    rows = []
    for name in sorted({name for scores in finals.values() for name in scores} - {_VERDICTS}):
        values = {cell: finals.get(cell, {}).get(name) for cell in sweep.runs}
        reasons = {cell: "has no such score" if cell in finals else why[cell] for cell in values}
        for one in compare_in(sweep, values, reasons):
            ours = [values[one.arm, seed] for seed in sweep.seeds]
            known = [value for value in ours if value is not None]
            mean = sum(known) / len(known) if known and len(known) == len(ours) else None
            told = {"better": "lower", "worse": "higher"}.get(one.verdict, said(one))
            cells = [
                replace(difference(one), kind=""),
                interval(one.low, one.high),
                number(one.corrected, ".3g"),
            ]
            verdict = Cell(told, told)
            rows.append([Cell(name, name), Cell(one.arm, one.arm), number(mean), *cells, verdict])
    columns = [Column("score", False), Column("arm", False), Column("mean"), Column("difference")]
    columns += [interval_column(), Column("p (Holm)"), Column("shown", False)]
    note = "The newest scores of each finished run. Whether higher is better depends on the score. Each is a family."
    return table("scores", "Downstream scores", columns, rows, note)
