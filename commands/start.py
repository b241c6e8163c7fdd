"""Train a checked config, and tell what came of it: what `train` and `decay` end with."""

from rich.console import Console

import ranks
from recipe.config import RunConfig
from training import report, signals
from training.effects import check_launch
from training.trainer import train_until


def start(config: RunConfig, console: Console, until: int | None = None) -> None:
    """until: tokens to pause at. console: rank 0's, quiet on others. Raises as train_until."""
    check_launch()
    was_finished = (config.folder / "summary.json").exists()
    with ranks.until_rank_0_ends(signals.received):  # it may evaluate or publish for hours yet
        summary = train_until(config, console, until)
        if summary is None:
            return
        report.closing_table(config, summary, console)
        evaluated = any(entry.name == "eval" for entry in config.evaluations)
        if was_finished and evaluated and ranks.rank() == 0:  # else it has waited for them
            from commands.follow import catch_up

            catch_up(config.folder, console)
