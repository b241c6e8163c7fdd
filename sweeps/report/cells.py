"""What tables of a report are made of, and the words and numbers that several of them show."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sweeps.results import Arm
from sweeps.statistics import Comparison


@dataclass(frozen=True)
class Cell:
    """text: for people. value: to sort by; None sorts last. bar: low, middle and high of an interval to draw."""

    text: str
    value: float | str | None = None
    bar: tuple[float, float, float] | None = None
    kind: str = ""
    """A verdict's name, for its colour: an interval alone has none."""
    csv: Sequence[float | str | None] = ()
    """In CSV files, where that is something else: a value for each of the column's `csv`."""


@dataclass(frozen=True)
class Column:
    head: str
    numeric: bool = True
    hint: str = ""
    csv: Sequence[str] = ()
    """Heads in CSV files, where they are others or several."""


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


def table(key: str, title: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], note: str = "") -> Table:
    ends = [abs(end) for row in rows for cell in row if cell.bar for end in cell.bar]
    return Table(key, title, columns, rows, note, max(ends, default=0.0))


def difference(found: Comparison) -> Cell:
    bar = None if found.low is None or found.high is None or found.mean is None else (found.low, found.mean, found.high)
    text = "-" if found.mean is None else f"{found.mean:+.4f}"
    return Cell(text, found.mean, bar, found.verdict if found.verdict in ("better", "worse") else "")


def interval(low: float | None, high: float | None) -> Cell:
    if low is None or high is None:
        return Cell("-")
    return Cell(f"[{low:+.4f}, {high:+.4f}]", low, csv=(low, high))


def interval_column(of: str = "") -> Column:
    """of: what to put before the heads of its CSV columns."""
    return Column("95 % interval", csv=(f"{of}95 % low", f"{of}95 % high"))


def said(found: Comparison) -> str:
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


def on_other_text(arms: Sequence[str]) -> str:
    return f"Not on the same held-out text as the baseline (other numbers of masked tokens): {', '.join(arms)}."


def differs(arm: Arm) -> Cell:
    parts = [f"{key}={short(value)}" for key, value in arm.changes.items()]
    parts += [f"({key}={short(value)})" for key, value in arm.adjusted.items()]
    text = "  ".join([*parts, *arm.notes])
    return Cell(text, text)


def short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {short(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(short, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
