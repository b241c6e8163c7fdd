"""A logger from outside the project: runs/NAME/metrics.csv, a row of step, name and value for each metric.

imports: [csv_logger.py]
loggers: [tensorboard, {name: csv, only: [train/loss, validation/loss]}]
"""

import csv
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from pydantic import Field

import ranks
from flexbert_core.schema import Component
from recipe.slots import LOGGERS


@LOGGERS.register("csv")
class CsvLogger(LoggerDestination):
    """Rank 0 writes what is logged at the end of a step. Rows of steps that a restart repeats are dropped before."""

    class Config(Component):
        only: list[str] = Field(["train/loss", "validation/loss"], min_length=1, description="names of metrics")

    def __init__(self, config: Config, *, name: str, run: dict[str, Any], folder: Path) -> None:
        self.only, self.file = set(config.only), folder / "metrics.csv"

    def fit_start(self, state: State, logger: Logger) -> None:
        if ranks.rank() == 0 and self.file.exists():
            with self.file.open(newline="") as file:
                kept = [row for row in csv.reader(file) if int(row[0]) <= state.timestamp.batch.value]
            with self.file.open("w", newline="") as file:
                csv.writer(file).writerows(kept)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        found = [(name, value) for name, value in metrics.items() if name in self.only]
        if found and ranks.rank() == 0:
            with self.file.open("a", newline="") as file:
                csv.writer(file).writerows((step, name, float(value)) for name, value in found)
