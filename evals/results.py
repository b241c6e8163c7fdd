"""Results: results.json for each model, and one table of all, on the screen, in Markdown and as CSV."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evals.driver import Outcome
from evals.interface import EvalConfig, Scores
from flexbert_core.composing import leaves
from flexbert_core.durable import write_file

_FEW = 12  # columns that fit on a screen


def write_results(outcome: Outcome, config: EvalConfig) -> Path:
    """results.json of a task; without scores where a cell failed."""
    task, model = outcome.task, outcome.task.model
    node = {
        "evaluation": task.name,
        "model": {"source": model.source, "label": model.label, "digest": model.digest, "tokens": model.tokens},
        "scores": outcome.scores,
        "complete": outcome.scores is not None,
        "failed": outcome.failed,
        "cells": outcome.results,
        "config": config.model_dump(mode="json"),
        "versions": {name: ", ".join(sorted(found)) for name, found in sorted(task.versions.items())},
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    file = task.folder / "results.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, json.dumps(node, indent=1, default=str) + "\n")
    return file


class ScoreTable:
    """Models as rows, scores as columns, of several evaluations."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.cells: dict[tuple[str, str], Any] = {}
        self.columns: list[str] = []

    def add(self, evaluation: str, row: str, scores: Scores | None, failed: Sequence[str] = ()) -> None:
        """scores: None where a cell failed: then nothing stands for it, and never a mean over what is there."""
        if row not in self.rows:
            self.rows.append(row)
        if scores is None:
            self.cells[row, evaluation] = f"incomplete ({len(failed)} failed)"
            self._column(evaluation)
            return
        for key, value in flat_scores(scores).items():
            column = f"{evaluation}: {key}"
            self._column(column)
            self.cells[row, column] = value

    def _column(self, name: str) -> None:
        if name not in self.columns:
            self.columns.append(name)

    def print(self, console: Console) -> None:
        """For a screen: rows are scores where there are more of them than fit beside one another."""
        table = Table(show_edge=False, pad_edge=False)
        if len(self.columns) <= min(_FEW, max(2, (console.width - 30) // 14)):
            table.add_column("model")
            for column in self.columns:
                table.add_column(Text(column), justify="right")
            for row in self.rows:
                table.add_row(Text(row), *(shown(self.cells.get((row, column))) for column in self.columns))
        else:
            table.add_column("score")
            for row in self.rows:
                table.add_column(Text(row), justify="right")
            for column in self.columns:
                table.add_row(Text(column), *(shown(self.cells.get((row, column))) for row in self.rows))
        console.print(table)

    def markdown(self) -> str:
        """A Markdown table: a row for each score."""
        lines = ["| | " + " | ".join(_escaped(row) for row in self.rows) + " |", "|---" * (len(self.rows) + 1) + "|"]
        for column in self.columns:
            values = [_escaped(shown(self.cells.get((row, column)))) for row in self.rows]
            lines.append(f"| {_escaped(column)} | " + " | ".join(values) + " |")
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """One line for each score of each model: model, evaluation and score, mean, deviation, best, seeds, and
        the 95 % interval where there is one."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        keys = ("mean", "deviation", "best", "seeds", "low", "high")
        writer.writerow(["model", "score", "value", *keys[1:]])
        for row in self.rows:
            for column in self.columns:
                value = self.cells.get((row, column))
                if isinstance(value, Mapping):
                    writer.writerow([row, column, *map(value.get, keys)])
                elif value is not None:
                    writer.writerow([row, column, value, *[None] * (len(keys) - 1)])
        return text.getvalue()


def flat_scores(scores: Scores) -> dict[str, Any]:
    """By one name each; a mapping with `mean` is one score, with `low` and `high` one with a 95 % interval."""
    found: dict[str, Any] = {}
    for key, value in scores.items():
        if isinstance(value, Mapping) and "mean" not in value:
            found |= {f"{key} {name}": each for name, each in flat_scores(value).items()}
        else:
            found[key] = value
    return found


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """A score of several seeds. deviation: of the sample; None of one seed."""
    mean = math.fsum(values) / len(values)
    deviation = (
        math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)) if values[1:] else None
    )
    return {"mean": mean, "deviation": deviation, "best": max(values), "seeds": len(values)}


def shown(value: Any) -> str:
    """One score for people."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        between = f" [{shown(value['low'])}, {shown(value['high'])}]" if "low" in value else ""
        if value.get("deviation") is None:
            return shown(value["mean"]) + between
        best = f"(best {shown(value['best'])} of {value['seeds']})"
        return f"{shown(value['mean'])} ± {value['deviation']:.4f}{between} {best}"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def numbers(scores: Scores) -> dict[str, float]:
    """Plain numbers by one name each, for metrics; of several seeds their mean."""
    flat = {key: value["mean"] if isinstance(value, Mapping) else value for key, value in flat_scores(scores).items()}
    return {key: value for key, value in leaves(flat).items() if isinstance(value, int | float)}


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
