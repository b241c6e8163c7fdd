"""What an evaluation is: slot `eval`, one class in one file of this room, or of a file that its YAML `imports`.

    @EVALS.register("letters")
    class Letters(Eval):
        class Config(EvalConfig):
            texts: UserPath

        def run(self, model, out):
            return {"accuracy": ...}

One whose work falls into parts derives from `CelledEval` instead: its cells are computed once each, resume one by one,
and may run at the same time.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from flexbert_core.schema import Component, Registry, Schema, UserPath
from jobs.base import JOBS

# Numbers by column of the table; a mapping with `mean` for what was measured with several seeds.
Scores = Mapping[str, Any]
LONGER = "longer than the model takes"
"""Stands in the place of a score of texts that a model is too short for."""


def distinct(key: str, values: Sequence[Any]) -> None:
    """Raises ValueError, for validators, where two values of a key are alike, or are so in the six digits that names of
    cells and columns have: one of them would stand for both."""
    shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    if len(set(shown)) != len(shown):
        raise ValueError(
            f"{key}: a value stands there twice: {list(values)}"
            if len(set(values)) != len(values)
            else f"{key}: two values are alike in six digits: {list(values)}"
        )


class EvalConfig(Component):
    """Base of the Configs of the slot's entries."""

    def packages(self) -> list[str]:
        """Modules that this evaluation imports and that only evaluations need (`make setup-eval`). Whether they are
        here is said before anything is computed, and before a run begins whose `evaluations` name it."""
        return []


EVALS = Registry("eval", base=EvalConfig, filled_by=["evals.entries"])


class EvalFile(Schema):
    """An evaluation, as a file of configs/eval/ says it."""

    imports: list[UserPath] = Field(
        default=[], description="Python files of yours that register evaluations; relative to this file"
    )
    evaluation: Annotated[Any, *EVALS.slot()] = Field(description="what is measured")
    executor: Annotated[Any, *JOBS.slot(optional=True)] = Field(
        default=None, description="where cells are computed; default: one after the other, in the command's process"
    )


@dataclass(frozen=True)
class Model:
    """A model to evaluate."""

    source: str
    """What leads to the same model in another process."""
    label: str
    """Its row in tables."""
    folder: Path
    """What `transformers` loads: config, weights, tokenizer."""
    digest: str
    """Of all its files but texts about them."""
    tokens: int | None = None
    """Slots that it was trained on, of a run of ours."""
    name: str = ""
    """Its label where no other model stands beside it: its results lie under it. Empty: the label."""


@dataclass(frozen=True)
class Cell:
    """A part of an evaluation that is computed at once, and once."""

    name: str
    """Unique in the evaluation; a path of its result's file, so `/` makes folders."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """All that the result depends on, besides the model and the code: plain values, data by their hashes."""
    group: str = "all"
    """Cells of a group run one after the other in one job."""

    def key(self, model: Model | None) -> str:
        """Another result has another one."""
        what = json.dumps([self.name, self.settings, model and model.digest], sort_keys=True, default=str)
        return hashlib.sha256(what.encode()).hexdigest()[:16]


class Eval(ABC):
    """Base of the slot's entries, which are made with their Config."""

    version: int = 1
    """Raised when the code's results change, so that older ones are computed again."""

    def __init__(self, config: Any) -> None:
        """Raises ConfigError for what cannot be evaluated, before any model is looked at: such as missing data."""
        self.config = config
        self.say: Callable[[str], None] = lambda text: None
        """For a line about how far a long computation is; whoever runs it sets where it goes."""

    @abstractmethod
    def run(self, model: Model, out: Path) -> Scores:
        """Evaluate one model. out: a folder for files of its own, which lasts. Raises RunError for what is wrong with
        the model or its results."""

    def scores_without_model(self) -> Mapping[str, Scores]:
        """Further rows of the table, such as what guessing scores, by their labels."""
        return {}

    def compare(self, results: Mapping[str, Mapping[str, Any]], out: Path) -> Sequence[str]:
        """What several models say beside one another: lines under the table, such as paired tests.

        results: of all models whose cells have all results, by label and cell (`all` of an evaluation without cells).
        out: a folder for files about all of them, such as a picture.
        """
        return []


class CelledEval(Eval):
    """An evaluation in parts."""

    @abstractmethod
    def cells(self, model: Model, results: Mapping[str, Any]) -> Sequence[Cell]:
        """The cells known so far. Asked again when all of them have results (by name, as given), until no new one
        comes: so a cell may depend on others' results."""

    @abstractmethod
    def compute(self, cell: Cell, model: Model, out: Path) -> Any:
        """A cell's result, plain values for JSON. out: as in `run`, shared by all cells."""

    @abstractmethod
    def scores(self, model: Model, results: Mapping[str, Any]) -> Scores:
        """Of the results of all cells."""

    def run(self, model: Model, out: Path) -> Scores:
        results: dict[str, Any] = {}
        while todo := [cell for cell in self.cells(model, results) if cell.name not in results]:
            for cell in todo:
                results[cell.name] = self.compute(cell, model, out)
        return self.scores(model, results)
