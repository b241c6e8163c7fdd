"""Tasks of classifying or scoring sentences and pairs: what they are, GLUE's among them, and their data."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from evals.text_data import Columns, Rows, read_rows, rows_of_hub, score_of
from evals.text_scores import METRICS
from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import ConfigError, Schema, UserPath

Column = str | int


class TextTask(Schema):
    """A task. Of GLUE's (cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, ax) the name says it all; of others,
    give text, label and metrics."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="one of GLUE's, or your own")
    data: UserPath | None = Field(
        default=None, description="its folder; default: of that name in the evaluation's `data`"
    )
    hub: str | None = Field(
        default=None, description="a dataset of the hub, NAME or NAME:SUBSET; default: the evaluation's"
    )
    train: str | None = Field(
        default=None, description="file or, of the hub, split to train on; default: train.tsv or train"
    )
    dev: dict[str, str] | None = Field(
        default=None,
        min_length=1,
        description="files or splits to score by, with a name for each where there are several",
    )
    text: Column | None = Field(
        default=None, description="column of the text: its name, or number from 0 without a header"
    )
    pair: Column | None = Field(default=None, description="column of the second text")
    label: Column | None = Field(default=None, description="column of the label")
    labels: list[str] | None = Field(
        default=None, min_length=2, description="the classes; default: those of the training file, sorted"
    )
    kind: Literal["classes", "score"] | None = Field(default=None, description="classes, or a number to be predicted")
    metrics: list[Literal["accuracy", "f1", "mcc", "pearson", "spearman"]] | None = Field(
        default=None, min_length=1, description="the task's score is their mean; f1: of the class that stands last"
    )
    epochs: list[int] | None = Field(
        default=None, min_length=1, description="how long to train; default: the evaluation's"
    )
    starts_from: str | None = Field(
        default=None,
        description="the one of the tasks whose best weights training starts from; GLUE: mnli, where that is one",
    )
    trained_on: str | None = Field(
        default=None, description="the task whose best weights are scored, without training (ax)"
    )

    @model_validator(mode="after")
    def _check(self) -> "TextTask":
        if self.data is not None and self.hub is not None:
            raise ValueError("give data (a folder) or hub (a dataset's name), not both")
        if self.name not in GLUE:
            for key in ("text", "label", "metrics"):
                if getattr(self, key) is None:
                    near = did_you_mean(self.name, GLUE)
                    raise ValueError(f"{self.name!r} is no task of GLUE ({near}); of your own give {key}, too")
        return self

    def packages(self) -> list[str]:
        """Those that its metrics import."""
        metrics = self.metrics or (GLUE[self.name].metrics if self.name in GLUE else ())
        return [package for metric in metrics if (package := METRICS[metric].package) is not None]


@dataclass(frozen=True)
class Known:
    """A task of GLUE: its official files, and the form that the hub's datasets have."""

    folder: str
    tsv: Columns
    hub: Columns
    metrics: tuple[str, ...]
    epochs: tuple[int, ...]
    labels: tuple[str, ...] | None = None
    kind: Literal["classes", "score"] = "classes"
    dev: Mapping[str, str] = None  # pyright: ignore[reportAssignmentType]
    hub_dev: Mapping[str, str] = None  # pyright: ignore[reportAssignmentType]
    starts_from: str | None = None
    trained_on: str | None = None
    unlabelled: tuple[str, Columns] | None = None
    """The official dev file without labels, for predictions only, where the one with labels is not there."""


_ENTAILED = ("entailment", "not_entailment")
_THREE = ("entailment", "neutral", "contradiction")  # in the order of the hub's numbers
_NO_YES = ("0", "1")
_SENTENCES = Columns("sentence1", "sentence2", "label")
_SHORT, _LONG = (1, 2, 3), (2, 5, 10)
_DEV, _VALIDATION = {"": "dev.tsv"}, {"": "validation"}
# Metrics, epochs and starts as in arXiv 2412.13663, appendix; the classes in the order of the hub's numbers.
GLUE: dict[str, Known] = {
    "cola": Known("CoLA", Columns(3, None, 1), Columns("sentence", None, "label"), ("mcc",), _LONG, _NO_YES),
    "sst2": Known(
        "SST-2", Columns("sentence", None, "label"), Columns("sentence", None, "label"), ("accuracy",), _SHORT, _NO_YES
    ),
    "mrpc": Known(
        "MRPC",
        Columns("#1 String", "#2 String", "Quality"),
        _SENTENCES,
        ("accuracy", "f1"),
        _LONG,
        _NO_YES,
        starts_from="mnli",
    ),
    "stsb": Known(
        "STS-B",
        Columns("sentence1", "sentence2", "score"),
        _SENTENCES,
        ("pearson", "spearman"),
        _LONG,
        kind="score",
        starts_from="mnli",
    ),
    "qqp": Known(
        "QQP",
        Columns("question1", "question2", "is_duplicate"),
        Columns("question1", "question2", "label"),
        ("accuracy", "f1"),
        _LONG,
        _NO_YES,
    ),
    "mnli": Known(
        "MNLI",
        Columns("sentence1", "sentence2", "gold_label"),
        Columns("premise", "hypothesis", "label"),
        ("accuracy",),
        _SHORT,
        _THREE,
        dev={"m": "dev_matched.tsv", "mm": "dev_mismatched.tsv"},
        hub_dev={"m": "validation_matched", "mm": "validation_mismatched"},
    ),
    "qnli": Known(
        "QNLI",
        Columns("question", "sentence", "label"),
        Columns("question", "sentence", "label"),
        ("accuracy",),
        _LONG,
        _ENTAILED,
    ),
    "rte": Known("RTE", _SENTENCES, _SENTENCES, ("accuracy",), _SHORT, _ENTAILED, starts_from="mnli"),
    "wnli": Known("WNLI", _SENTENCES, _SENTENCES, ("accuracy",), _LONG, _NO_YES),
    "ax": Known(
        "AX",
        Columns("Premise", "Hypothesis", "Label"),
        Columns("premise", "hypothesis", "label"),
        ("mcc",),
        _SHORT,
        _THREE,
        dev={"": "diagnostic-full.tsv"},
        unlabelled=("diagnostic.tsv", Columns("sentence1", "sentence2", None)),
        hub_dev={"": "test"},
        trained_on="mnli",
    ),
}


@dataclass(frozen=True)
class TaskData:
    """A task, with its rows. labels of rows: class numbers, or float scores."""

    name: str
    kind: Literal["classes", "score"]
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    epochs: tuple[int, ...] | None
    starts_from: str | None
    trained_on: str | None
    train: Rows | None
    dev: dict[str, Rows]

    @property
    def num_labels(self) -> int:
        return len(self.classes) if self.kind == "classes" else 1

    @property
    def digest(self) -> str:
        """Of its rows and the names of its splits."""
        parts = {
            "train": self.train and self.train.digest,
            **{f"dev {name}": each.digest for name, each in self.dev.items()},
        }
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def load_task(task: TextTask, data: str | None, hub: str | None) -> TaskData:
    """Read a task's rows. data, hub: the evaluation's, for tasks that say neither.

    Raises ConfigError naming file, column, row or label.
    """
    known = GLUE.get(task.name)
    own = task.data is not None
    data, hub = (task.data, None) if own else (None, task.hub) if task.hub is not None else (data, hub)
    if data is None and hub is None:
        raise ConfigError(f"tasks: {task.name}: no data: give data=FOLDER or hub=NAME")
    columns = _columns(task, known, from_hub=hub is not None)
    metrics = tuple(task.metrics or (known.metrics if known else ()))
    kind = task.kind or (known.kind if known else "score" if metrics[0] in ("pearson", "spearman") else "classes")
    for metric in metrics:
        if METRICS[metric].kind != kind:
            raise ConfigError(f"tasks: {task.name}: metrics: {metric} is no metric of {kind}")
    trained_on = task.trained_on or (known.trained_on if known else None)
    if hub is not None:
        name, _, subset = hub.partition(":")
        dev_names = task.dev or (known and known.hub_dev) or _VALIDATION
        subset = subset or (task.name if known and task.hub is None else "")
        train = None if trained_on else rows_of_hub(name, subset or None, task.train or "train", columns)
        dev = {key: rows_of_hub(name, subset or None, split, columns) for key, split in dev_names.items()}
    else:
        folder = Path(str(data)) if own else _folder(Path(str(data)), known.folder if known else task.name)
        dev_names = task.dev or (known and known.dev) or _DEV
        if (
            known
            and known.unlabelled
            and task.dev is None
            and not any((folder / file).is_file() for file in dev_names.values())
        ):
            dev_names, columns = {"": known.unlabelled[0]}, known.unlabelled[1]
        train = None if trained_on else read_rows(folder / (task.train or "train.tsv"), columns)
        dev = {key: read_rows(folder / file, columns) for key, file in dev_names.items()}
    classes = tuple(task.labels or (known and known.labels) or ())
    if kind == "classes" and not classes:
        if train is None:
            raise ConfigError(f"tasks: {task.name}: trained_on: give labels, the classes of {trained_on}")
        classes = tuple(sorted({str(label) for label in train.labels or ()}))
    if "f1" in metrics and len(classes) != 2:
        raise ConfigError(f"tasks: {task.name}: metrics: f1 is of two classes, there are {len(classes)}: use accuracy")
    place = f"tasks: {task.name}"
    splits = {} if train is None else {f"{place}: train": train}
    splits |= {f"{place}: dev {key}".rstrip(): rows for key, rows in dev.items()}
    by_name = known is None and task.labels is None
    by_name = by_name or _say_names([label for rows in splits.values() for label in _visible(rows) or ()], classes)
    labelled = {where: _labelled(rows, kind, classes, by_name, where) for where, rows in splits.items()}
    return TaskData(
        task.name,
        kind,
        classes,
        metrics,
        tuple(task.epochs) if task.epochs else known.epochs if known else None,
        task.starts_from or (known.starts_from if known else None),
        trained_on,
        labelled.get(f"{place}: train"),
        {key: labelled[f"{place}: dev {key}".rstrip()] for key in dev},
    )


def check_labels(task: TaskData) -> None:
    """Raises ConfigError for a task that cannot be trained and scored."""
    if task.train is None or task.train.labels is None:
        raise ConfigError(f"tasks: {task.name}: has no labelled training rows: leave it out")
    if all(rows.labels is None for rows in task.dev.values()):
        raise ConfigError(f"tasks: {task.name}: its dev set has no labels")


def first_rows(task: TaskData, most: int | None) -> TaskData:
    """The task with so many training rows, its first. Raises ConfigError where a class is in none of them: the file is
    sorted, and another class would be all that a model learns."""
    train = task.train
    if train is None or most is None or len(train) <= most:
        return task
    pairs, labels = (None if column is None else column[:most] for column in (train.pairs, train.labels))
    if task.kind == "classes" and (lost := set(train.labels or ()) - set(labels or ())):
        raise ConfigError(
            f"tasks: {task.name}: rows: the class {task.classes[min(lost)]} is in none of the first {most} training "
            f"rows of {len(train)}: shuffle them, or give more rows (null: all)"
        )
    return replace(task, train=Rows(train.texts[:most], pairs, labels))


def check_names(tasks: Sequence[TextTask]) -> None:
    """Raises ValueError, for validators, where two tasks have one name."""
    names = [task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"tasks: {twice[0]} stands there twice")


def _columns(task: TextTask, known: Known | None, from_hub: bool) -> Columns:
    if known is None:
        assert task.text is not None
        return Columns(task.text, task.pair, task.label)
    columns = known.hub if from_hub or not _is_tsv(task) else known.tsv
    text, pair, label = (
        getattr(columns, key) if getattr(task, key) is None else getattr(task, key) for key in ("text", "pair", "label")
    )
    return Columns(text, pair, label)


def _is_tsv(task: TextTask) -> bool:
    return (task.train or "train.tsv").endswith(".tsv")


def _folder(data: Path, name: str) -> Path:
    """The task's in a folder of several, whatever its case."""
    if not data.is_dir():
        raise ConfigError(f"data: {data}: no such folder")
    plain = name.lower().replace("-", "")
    for path in sorted(data.iterdir()):
        if path.is_dir() and path.name.lower().replace("-", "").replace("_", "") == plain:
            return path
    raise ConfigError(f"data: {data}: no folder {name} in it")


def _visible(rows: Rows) -> list[Any] | None:
    """Its labels; None where all of them are hidden (the hub says -1)."""
    if rows.labels is None or all(label in (-1, "-1", None) for label in rows.labels):
        return None
    return rows.labels


def _say_names(labels: Sequence[Any], classes: tuple[str, ...]) -> bool:
    """Whether whole numbers among a task's labels are names of classes, as 1 and 2 are where the classes are 1 and 2;
    else they number the classes from 0, as the hub's do. All splits are asked at once, so that they are read alike."""
    return all(str(label) in classes for label in labels)


def _labelled(rows: Rows, kind: str, classes: tuple[str, ...], by_name: bool, place: str) -> Rows:
    """With class numbers or floats for labels; None where they are hidden."""
    labels = _visible(rows)
    if labels is None:
        return Rows(rows.texts, rows.pairs, None)
    numbers: list[Any] = []
    shown = ", ".join(classes)
    for row, label in enumerate(labels, 1):
        if kind == "score":
            numbers.append(score_of(label, f"{place}: row {row}"))
        elif not by_name and isinstance(label, int) and not isinstance(label, bool):
            if not 0 <= label < len(classes):
                raise ConfigError(f"{place}: row {row}: {label} is no class, nor the number of one from 0: {shown}")
            numbers.append(label)
        elif str(label) in classes:
            numbers.append(classes.index(str(label)))
        else:
            raise ConfigError(f"{place}: row {row}: {label!r} is no class; they are: {shown}")
    return Rows(rows.texts, rows.pairs, numbers)
