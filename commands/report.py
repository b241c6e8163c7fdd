"""`main.py report`: what there is to see of runs and sweeps, as a page, a picture or tables."""

from collections.abc import Sequence
from pathlib import Path

from flexbert_core.schema import ConfigError

PICTURES = (".png", ".pdf", ".svg")


def report(paths: Sequence[Path], output: Path | None, watch: bool) -> list[Path]:
    """Write it and return where it lies.

    The ending of `output` says what: .html the page, .md or .tex the tables of results, .png, .pdf or .svg the picture
    of one run. Without `output`: the page, in the folder of the run or sweep, and of a run its curves.png, too.
    Raises ConfigError for what is no run or sweep, and for what cannot be written.
    """
    from sweeps.report.writing import ENDINGS, watch_report, write_report

    if output is not None and output.suffix in PICTURES:
        from training.curves import report as draw

        if len(paths) > 1:
            raise ConfigError(f"--output: {output}: a picture is of one run: give one, or a page (.html)")
        if watch:
            raise ConfigError(f"--watch: {output}: is for pages and tables: give a .html, .md or .tex file")
        return [draw(paths[0], output)]
    if output is None and len(paths) > 1:
        raise ConfigError("--output: say where the page of several runs goes, such as --output report.html")
    page = output or paths[0] / "report.html"
    if page.suffix not in ENDINGS:
        known = ", ".join((*ENDINGS, *PICTURES))
        raise ConfigError(f"--output: {page}: the ending says what is written: give one of {known}")
    if watch:
        watch_report(paths, page)
    else:
        write_report(paths, page)
    if output is None and (paths[0] / "config.yaml").exists():
        from training.curves import report as draw

        return [page, draw(paths[0], None)]
    return [page]
