"""The page: one file that asks nothing of the network and runs no script but its own.

Its Content-Security-Policy names its two scripts and its style by their hashes. Plotly writes its own rules through the
CSSOM, into a style element that it makes: that element is empty, and its hash is named, too.
"""

import base64
import hashlib
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from sweeps.report.cells import Cell, Table
from sweeps.report.pictures import pictures
from sweeps.report.subject import Subject
from sweeps.report.tables import tables
from sweeps.statistics import verdicts

_HERE = Path(__file__).parent
_BAR_WIDTH, _BAR_EDGE = 120.0, 4.0


def page(subject: Subject, reload_seconds: int | None = None) -> str:
    """HTML. reload_seconds: of a page that is written again and again."""
    plotly, app, style = ((_HERE / name).read_text() for name in ("vendor/plotly-basic.min.js", "app.js", "style.css"))
    data = pictures(subject) | {"reload": reload_seconds}
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(minus=_minus, breakable=_breakable, bar=_bar)
    found = tables(subject)
    first = [table for table in found if table.key in ("verdicts", "runs")]
    return environment.get_template("template.html").render(
        subject=subject,
        first=first,
        others=[table for table in found if table not in first],
        charts=data["charts"],
        summary=_summary(subject),
        data=_embedded(data),
        written=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        thinned=data["points"] if data["thinned"] else None,
        plotly=Markup(plotly),
        app=Markup(app),
        style=Markup(style),
        policy=(
            f"default-src 'none'; script-src {_hash(plotly)} {_hash(app)}; style-src {_hash(style)} {_hash('')}; "
            "img-src data: blob:; base-uri 'none'; form-action 'none'"
        ),
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(node: Any) -> Markup:
    """JSON that no text in it can end: < > & are escapes, so are the line separators of JavaScript."""
    text = json.dumps(node, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _summary(subject: Subject) -> list[str]:
    """The first lines: what was found, in words."""
    if subject.sweep is None:
        return []
    found = [each.verdict for each in verdicts(subject.sweep)]
    counts = {name: found.count(name) for name in dict.fromkeys(found)}
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    arms, seeds = len(subject.arms) - 1, len(subject.sweep.seeds)
    plural = "s" * (arms != 1)
    lines = [f"{arms} arm{plural} against {subject.sweep.baseline} over {seeds} seed{'s' * (seeds != 1)}: {told}."]
    if seeds < 2:
        lines.append("One seed says nothing about seeds: there are no verdicts.")
    return lines


def _minus(text: str) -> str:
    return re.sub(r"(?<![\w.])-(?=\d)", "\u2212", "\u2013" if text == "-" else text)


def _breakable(text: str) -> Markup:
    """Dotted keys break behind a dot or an equals sign, not inside a word."""
    return Markup(re.sub(r"([.=/_])(?=\w)", r"\1<wbr>", str(escape(text))))


def _bar(cell: Cell, table: Table) -> Markup:
    """An interval as a picture on the table's common scale; nothing without one."""
    if cell.bar is None:
        return Markup("")
    half = _BAR_WIDTH / 2
    low, middle, high = (half + end / (table.reach or 1.0) * (half - _BAR_EDGE) for end in cell.bar)
    return Markup(
        '<svg class="bar {kind}" width="{width}" height="14" aria-hidden="true">'
        '<line class="zero" x1="{half}" x2="{half}" y1="0" y2="14"/>'
        '<line class="span" x1="{low}" x2="{high}" y1="7" y2="7"/>'
        '<circle cx="{middle}" cy="7" r="3"/></svg>'
    ).format(kind=cell.kind, width=_BAR_WIDTH, half=half, low=f"{low:.1f}", high=f"{high:.1f}", middle=f"{middle:.1f}")
