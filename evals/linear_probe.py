"""What a linear model reads from frozen embeddings: any text task, GLUE's or your own, without fine-tuning.

Features of a pair are |u - v| and u * v of its embeddings (SentEval: Conneau & Kiela 2018, arXiv 1803.05449).
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from data.keyed import keyed_generator
from evals.embedding_models import EmbeddingConfig, EmbeddingModel, LastEmbeddingModel, embedding_settings
from evals.interface import EVALS, Cell, CelledEval, Model, Scores
from evals.text_data import Rows
from evals.text_scores import scored
from evals.text_tasks import TaskData, TextTask, check_labels, check_names, first_rows, load_task
from flexbert_core.schema import ConfigError, UserPath, or_text


def _task(node: Any) -> Any:
    return {"name": node} if isinstance(node, str) else node


Task = Annotated[TextTask, BeforeValidator(_task), or_text(".", "sst2")]


@EVALS.register("linear_probe")
class LinearProbe(CelledEval):
    """Logistic regression (classes) or ridge regression (scores) on standardised features. Its strength is chosen on a
    fifth of the training rows, which it then learns from, too. A task's score is the mean of its metrics."""

    class Config(EmbeddingConfig):
        tasks: list[Task] = Field(  # pyright: ignore[reportAssignmentType]
            default=["sst2", "cola", "mrpc", "rte", "stsb"], min_length=1, description="GLUE's by name, or your own"
        )
        data: UserPath | None = Field(default=None, description="a folder with a folder for each task, as GLUE comes")
        hub: str | None = Field(
            default=None, description="a dataset of the hub with them as subsets; the network is used"
        )
        strengths: list[Annotated[float, Field(gt=0)]] = Field(
            default=[1e-3, 1e-2, 1e-1, 1.0],
            min_length=1,
            description="C of logistic regression; of ridge, alpha is 1 / C",
        )
        rows: int | None = Field(
            default=5000,
            ge=1,
            description="training rows of a task at most, its first, which must have all classes; null: all",
        )
        seed: int = Field(default=0, ge=0, description="of the choice of a fifth")

        @model_validator(mode="after")
        def _check(self) -> Any:
            check_names(self.tasks)
            return self

        def packages(self) -> list[str]:
            return ["sklearn"]

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.data is not None and config.hub is not None:
            raise ConfigError("give data (a folder) or hub (a dataset's name), not both")
        tasks = [load_task(task, config.data, config.hub) for task in config.tasks]
        for task in tasks:
            check_labels(task)
        self.tasks = {task.name: first_rows(task, config.rows) for task in tasks}
        self._models = LastEmbeddingModel(config)

    def cells(self, model: Model, results: Mapping[str, Any]) -> list[Cell]:
        settings = self.config.model_dump(include={"strengths", "rows", "seed"}) | embedding_settings(self.config)
        return [
            Cell(name, {**settings, "data": task.digest, "task": [task.kind, task.classes, task.metrics]})
            for name, task in self.tasks.items()
        ]

    def compute(self, cell: Cell, model: Model, out: Path) -> Any:
        task, embedder = self.tasks[cell.name], self._models.of(model)
        assert task.train is not None
        assert task.train.labels is not None
        features, cut = _features(embedder, task.train)
        labels = np.asarray(task.train.labels)
        order = keyed_generator(self.config.seed, "linear probe", 0).permutation(len(labels))
        chosen, rest = order[: max(1, len(order) // 5)], order[max(1, len(order) // 5) :]
        strength = self.config.strengths[0]
        if len(self.config.strengths) > 1 and len(rest):
            tried = [
                scored(
                    task.metrics,
                    labels[chosen].tolist(),
                    _answers(_fit(task, features[rest], labels[rest], each), features[chosen]),
                )["score"]
                for each in self.config.strengths
            ]
            strength = self.config.strengths[tried.index(max(tried))]
        fitted = _fit(task, features, labels, strength)
        found: dict[str, Any] = {}
        scores = []
        for name, rows in task.dev.items():
            if rows.labels is None:
                continue
            held_out, cut_here = _features(embedder, rows)
            cut += cut_here
            values = scored(task.metrics, rows.labels, _answers(fitted, held_out))
            scores.append(values.pop("score"))
            found |= {f"{metric} {name}".strip(): value for metric, value in values.items()}
        return {
            **found,
            "score": math.fsum(scores) / len(scores),
            "strength": strength,
            "cut_texts": cut,
            "runtime": embedder.runtime,
        }

    def scores(self, model: Model, results: Mapping[str, Any]) -> Scores:
        found = {name: results[name]["score"] for name in self.tasks}
        return {**found, "average": math.fsum(found.values()) / len(found)} if len(found) > 1 else found


def _features(embedder: EmbeddingModel, rows: Rows) -> tuple[Any, int]:
    """(rows, D), or (rows, 2 D) of pairs, float32, and how many texts were cut."""
    first, cut = embedder.embed(rows.texts)
    if rows.pairs is None:
        return first, cut
    second, also = embedder.embed(rows.pairs)
    return np.concatenate((np.abs(first - second), first * second), axis=1), cut + also


def _fit(task: TaskData, features: Any, labels: Any, strength: float) -> Any:
    from sklearn.dummy import DummyClassifier
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if task.kind == "score":
        model: Any = Ridge(alpha=1 / strength)
    elif len(np.unique(labels)) == 1:  # LogisticRegression refuses a single class
        model = DummyClassifier(strategy="most_frequent")
    else:
        model = LogisticRegression(C=strength, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an optimum that 1000 iterations do not reach is near enough
        return make_pipeline(StandardScaler(), model).fit(features, labels)


def _answers(fitted: Any, features: Any) -> Sequence[Any]:
    return fitted.predict(features).tolist()
