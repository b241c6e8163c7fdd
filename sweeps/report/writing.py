"""Writing a report: the ending of the file says which kind, once or for as long as something trains."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flexbert_core.durable import write_file
from flexbert_core.schema import ConfigError
from sweeps.report.cells import Table
from sweeps.report.page import page
from sweeps.report.subject import Subject, read_subject
from sweeps.report.tables import tables

ENDINGS = (".html", ".md", ".tex")
_SECONDS = 10  # between two pages of --watch
_QUIET = 3  # times that nothing trains before --watch ends: an executor takes a moment between two runs


def write_report(paths: Sequence[Path], output: Path, reload_seconds: int | None = None) -> Subject:
    """Write the page (.html) or the tables (.md, .tex) of one sweep, or of runs, in one step.

    Raises ConfigError for what is neither, for another ending, and for a place that cannot be written.
    """
    if output.suffix not in ENDINGS:
        raise ConfigError(f"--output: {output}: give a file that ends in .html, .md or .tex")
    subject = read_subject(paths)
    if output.suffix == ".html":
        text = page(subject, reload_seconds)
    else:
        text = (markdown if output.suffix == ".md" else latex)(subject)
    try:
        write_file(output, text)
    except OSError as error:
        raise ConfigError(f"--output: {output}: {error.strerror}: give a file in a folder that exists") from None
    return subject


def watch_report(paths: Sequence[Path], output: Path, sleep: Callable[[float], None] = time.sleep) -> None:
    """Write it again and again until nothing trains; the page loads itself anew."""
    quiet = 0
    while quiet < _QUIET:
        quiet = 0 if write_report(paths, output, _SECONDS).alive else quiet + 1
        sleep(_SECONDS)
    write_report(paths, output)


def markdown(subject: Subject) -> str:
    """Every table of the report, for a README or an appendix."""
    parts = [f"# {_markdown(subject.title)}\n", *_incomplete(subject, _markdown)]
    for table in tables(subject):
        parts.append(f"## {table.title}\n")
        parts.append("| " + " | ".join(column.head for column in table.columns) + " |")
        parts.append("|" + "|".join("---:" if column.numeric else "---" for column in table.columns) + "|")
        parts += ["| " + " | ".join(_markdown(cell.text) for cell in row) + " |" for row in table.rows]
        parts.append(f"\n{_markdown(table.note)}\n")
    return "\n".join(parts)


def latex(subject: Subject) -> str:
    """Every table of the report as a `table` with booktabs' rules."""
    parts = ["% \\usepackage{booktabs}", *_incomplete(subject, lambda text: "% " + _latex(text))]
    for table in tables(subject):
        parts += ["\\begin{table}", "\\centering\\small", f"\\caption{{{_latex(_caption(table))}}}"]
        parts.append(f"\\begin{{tabular}}{{{''.join('r' if column.numeric else 'l' for column in table.columns)}}}")
        parts += ["\\toprule", " & ".join(_latex(column.head) for column in table.columns) + " \\\\", "\\midrule"]
        parts += [" & ".join(_latex(cell.text, column.numeric) for cell, column in zip(row, table.columns, strict=True))
                  + " \\\\" for row in table.rows]  # fmt: skip
        parts += ["\\bottomrule", "\\end{tabular}", "\\end{table}", ""]
    return "\n".join(parts)


def _incomplete(subject: Subject, form: Callable[[str], str]) -> list[str]:
    if subject.sweep is None or not subject.missing:
        return []
    cells = ", ".join(f"{arm} seed {seed} ({state})" for arm, seed, state in subject.missing)
    return [
        form(f"Incomplete: {len(subject.missing)} of {len(subject.sweep.runs)} runs are not finished: {cells}.") + "\n"
    ]


def _caption(table: Table) -> str:
    return f"{table.title}. {table.note}" if table.note else f"{table.title}."


def _markdown(text: str) -> str:
    """User's text as text: no markup, no HTML, one line."""
    text = re.sub(r"([\\`*_{}\[\]|~#])", r"\\\1", text)
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def _latex(text: str, numeric: bool = False) -> str:
    told = "".join(_TEX.get(sign, sign) for sign in " ".join(text.split()))
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", told) if numeric else told
