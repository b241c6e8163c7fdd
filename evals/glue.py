"""GLUE, and any other tasks of classes or scores of sentences and pairs: fine-tuning over a grid and seeds.

The protocol is arXiv 2412.13663's, with batch 64 for all tasks and RTE, MRPC and STS-B from the weights of MNLI, as its
authors answered (github.com/AnswerDotAI/ModernBERT, issues 196 and 225).
"""

import itertools
import logging
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from safetensors.torch import load_file, save_file

from data.keyed import torch_seed
from evals.classifiers import Classifier, encode, load_classifier, load_tokenizer, longest
from evals.finetuning import Plan, Split, answers, dev_scores, fine_tune, predict
from evals.interface import EVALS, Cell, CelledEval, EvalConfig, Model, Scores, distinct
from evals.loading import Precision, precision_of
from evals.results import over_seeds
from evals.text_data import Rows
from evals.text_scores import scored
from evals.text_tasks import TaskData, TextTask, check_labels, check_names, first_rows, load_task
from flexbert_core.durable import write_file
from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import ConfigError, RunError, UserPath, or_text
from recipe.slots import OPTIMIZERS

log = logging.getLogger(__name__)


def _task(node: Any) -> Any:
    return {"name": node} if isinstance(node, str) else node


Task = Annotated[TextTask, BeforeValidator(_task), or_text(".", "rte")]


@EVALS.register("glue")
class Glue(CelledEval):
    """Fine-tuned scores of text tasks, GLUE's or your own. The score of a task is the mean of its metrics on its dev
    set, at the point of the grid whose mean over seeds is best; `average` is the mean over tasks."""

    class Config(EvalConfig):
        tasks: list[Task] = Field(  # pyright: ignore[reportAssignmentType]
            default=["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"],
            min_length=1,
            description="of GLUE by their names, or your own",
        )
        data: UserPath | None = Field(default=None, description="a folder with a folder for each task, as GLUE comes")
        hub: str | None = Field(
            default=None,
            description="a dataset of the hub that has them as subsets, such as nyu-mll/glue; the network is used",
        )
        seeds: list[Annotated[int, Field(ge=0)]] = Field(
            default=[0, 1, 2], min_length=1, description="one training for each"
        )
        lr: list[Annotated[float, Field(gt=0)]] = Field(
            default=[1e-5, 3e-5, 5e-5, 8e-5], min_length=1, description="grid: peak learning rates"
        )
        weight_decay: list[Annotated[float, Field(ge=0)]] = Field(
            default=[1e-6, 5e-6, 8e-6, 1e-5], min_length=1, description="grid: as the optimizer understands it"
        )
        epochs: list[Annotated[int, Field(ge=1)]] | None = Field(
            default=None, min_length=1, description="grid: default: as each task says (1, 2, 3 or 2, 5, 10)"
        )
        batch_size: int = Field(default=64, ge=1, description="rows a step")
        max_length: int = Field(
            default=512, ge=8, description="tokens of a row at most; longer ones are cut, and counted"
        )
        warmup: float = Field(default=0.06, ge=0, lt=1, description="share of the steps over which lr rises")
        early_stopping: int | None = Field(
            default=3, ge=1, description="epochs without a better score after which training ends; null: never"
        )
        optimizer: Annotated[Any, *OPTIMIZERS.slot()] = Field(
            default="stableadamw", description="its weight_decay is the grid's"
        )
        pooling: Literal["cls", "mean"] | None = Field(
            default=None, description="what the classifier reads; default: as transformers has it for the architecture"
        )
        runtime: Literal["flexbert", "transformers"] | None = Field(
            default=None,
            description="default: ours, unpadded, for architectures that it knows, else transformers, padded",
        )
        precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="auto: bf16 on a GPU")
        microbatch_tokens: int = Field(default=16384, ge=1, description="slots at once in a step, which bounds memory")
        rows: int | None = Field(
            default=None,
            ge=1,
            description="training rows of a task at most, its first, which must have all classes; default: all",
        )

        @model_validator(mode="after")
        def _check(self) -> Any:
            check_names(self.tasks)
            for key in ("seeds", "lr", "weight_decay", "epochs"):
                distinct(key, getattr(self, key) or [])
            return self

        def packages(self) -> list[str]:
            return [package for task in self.tasks for package in task.packages()]

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.data is not None and config.hub is not None:
            raise ConfigError("give data (a folder) or hub (a dataset's name), not both")
        tasks = [load_task(task, config.data, config.hub) for task in config.tasks]
        for task in tasks:
            if task.trained_on is None:
                check_labels(task)
        self.tasks = {task.name: first_rows(task, config.rows) for task in tasks}
        for given, task in zip(config.tasks, tasks, strict=True):
            self._check_start(given, task)
            for other in (task.starts_from, task.trained_on):
                if other == task.name or (other in self.tasks and self.tasks[str(other)].starts_from):
                    raise ConfigError(f"tasks: {task.name}: starts from {other}, which starts from another task")
            if task.trained_on is not None and task.trained_on not in self.tasks:
                raise ConfigError(f"tasks: {task.name}: is scored with the model of {task.trained_on}: add that task")
            if task.trained_on is not None and task.num_labels != self.tasks[task.trained_on].num_labels:
                raise ConfigError(
                    f"tasks: {task.name}: labels: there are {task.num_labels}, of {task.trained_on}, whose model is "
                    f"scored, {self.tasks[task.trained_on].num_labels}: give the classes of {task.trained_on}"
                )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision: Precision = precision_of(config.precision)
        self._encoded: dict[tuple[str, str], tuple[Split | None, dict[str, Split], dict[str, int]]] = {}

    def _check_start(self, given: TextTask, task: TaskData) -> None:
        """Raises ConfigError where a task is to start from one that is not here; GLUE's by default are only warned of,
        since a part of GLUE is a fair thing to run."""
        if given.starts_from is not None and task.trained_on is not None:
            raise ConfigError(
                f"tasks: {task.name}: starts_from: is not trained, but scored with the model of {task.trained_on}: "
                "leave it out"
            )
        if given.starts_from is not None and given.starts_from not in self.tasks:
            raise ConfigError(
                f"tasks: {task.name}: starts_from: {given.starts_from} is none of the tasks, "
                f"{did_you_mean(given.starts_from, self.tasks)}: add that task, or leave it out"
            )
        if task.trained_on is None and task.starts_from is not None and task.starts_from not in self.tasks:
            log.warning(
                "tasks: %s: starts from the model itself, not from the weights of %s as the protocol has it: add that "
                "task for those",
                task.name,
                task.starts_from,
            )

    # Which cells there are

    def cells(self, model: Model, results: Mapping[str, Any]) -> list[Cell]:
        found: list[Cell] = []
        for task in self.tasks.values():
            origin = self._origin(task)
            if origin is None:
                found += self._grid(task)
                continue
            best = self._best(origin, results)
            if best is None:
                continue  # the grid that it starts from is not done
            for seed in self.config.seeds:
                start = self._start(origin, best, seed)
                found.append(start)
                if task.trained_on is not None:
                    found.append(
                        Cell(f"{task.name}/seed{seed}", {**self._of(task), "start": start.key(model)}, task.name)
                    )
                    continue
                found += [
                    Cell(cell.name, {**cell.settings, "start": start.key(model)}, cell.group)
                    for cell in self._grid(task, seed)
                ]
        # Several tasks start from the same weights, and those must be there before.
        unique = list({cell.name: cell for cell in found}.values())
        starts = [cell for cell in unique if "/start" in cell.name and cell.name not in results]
        if not starts:
            return unique
        waiting = {name for name, task in self.tasks.items() if self._origin(task) is not None}
        return [cell for cell in unique if cell.name.split("/")[0] not in waiting]

    def _origin(self, task: TaskData) -> TaskData | None:
        """The task whose weights it starts from, if that is here."""
        return self.tasks.get(task.trained_on or task.starts_from or "")

    def _of(self, task: TaskData) -> dict[str, Any]:
        """Settings that all cells of a task have."""
        config = self.config
        names = (
            "batch_size",
            "max_length",
            "warmup",
            "early_stopping",
            "pooling",
            "runtime",
            "rows",
            "microbatch_tokens",
        )
        return {
            **{name: getattr(config, name) for name in names},
            "optimizer": config.optimizer.model_dump(),
            "precision": self.precision,
            "data": task.digest,
            "task": [task.kind, task.classes, task.metrics],
        }

    def _points(self, task: TaskData) -> list[tuple[float, float, int]]:
        epochs = self.config.epochs or task.epochs or (2, 5, 10)
        return list(itertools.product(self.config.lr, self.config.weight_decay, epochs))

    def _grid(self, task: TaskData, seed: int | None = None) -> list[Cell]:
        seeds = self.config.seeds if seed is None else [seed]
        return [self._cell(task, point, number) for number in seeds for point in self._points(task)]

    def _cell(self, task: TaskData, point: tuple[float, float, int], seed: int, kind: str = "") -> Cell:
        lr, weight_decay, epochs = point
        name = f"{task.name}/{kind}lr{lr:g}-wd{weight_decay:g}-epochs{epochs}-seed{seed}"
        settings = {"lr": lr, "weight_decay": weight_decay, "epochs": epochs, "seed": seed, **self._of(task)}
        return Cell(name, settings, f"{task.name}-seed{seed}")

    def _start(self, task: TaskData, point: tuple[float, float, int], seed: int) -> Cell:
        return self._cell(task, point, seed, "start-")

    def _best(self, task: TaskData, results: Mapping[str, Any]) -> tuple[float, float, int] | None:
        """The point with the best mean over seeds, the first of several; None while a result is missing."""
        means = []
        for point in self._points(task):
            names = [self._cell(task, point, seed).name for seed in self.config.seeds]
            if any(name not in results for name in names):
                return None
            means.append(math.fsum(results[name]["score"] for name in names) / len(names))
        return self._points(task)[means.index(max(means))]

    # One cell

    def compute(self, cell: Cell, model: Model, out: Path) -> Any:
        task = self.tasks[cell.name.split("/")[0]]
        if task.trained_on is not None:
            return self._diagnose(task, cell, model, out)
        train, dev, cut = self._rows(task, model)
        assert train is not None
        settings = cell.settings
        plan = Plan(
            lr=settings["lr"],
            epochs=settings["epochs"],
            batch_size=self.config.batch_size,
            seed=settings["seed"],
            optimizer=self.config.optimizer.model_copy(update={"weight_decay": settings["weight_decay"]}),
            warmup=self.config.warmup,
            early_stopping=self.config.early_stopping,
            microbatch_tokens=self.config.microbatch_tokens,
            precision=self.precision,
        )
        start = load_file(out / f"start-{settings['start']}.safetensors") if "start" in settings else None
        classifier = self._classifier(task, model, settings["seed"], start)
        result, weights = fine_tune(
            classifier, train, lambda current: self._scored(current, task, dev), plan, task.kind, self.device, self.say
        )
        if "/start-" in cell.name:
            path = out / f"start-{cell.key(model)}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
        origin = self._origin(task)
        starts_from = classifier.starts_from if origin is None else f"the weights of {origin.name}"
        return {**result, "cut_rows": cut, "runtime": classifier.runtime, "starts_from": starts_from}

    def _classifier(self, task: TaskData, model: Model, seed: int, start: Any) -> Classifier:
        return load_classifier(
            model.folder,
            task.num_labels,
            torch_seed(seed, "fine-tuning head"),
            self.device,
            self.config.pooling,
            start,
            self.config.runtime,
        )

    def _scored(self, classifier: Classifier, task: TaskData, dev: Mapping[str, Split]) -> dict[str, float]:
        tokens = self.config.microbatch_tokens
        return dev_scores(classifier, dev, task.metrics, task.kind, self.device, self.precision, tokens)

    def _diagnose(self, task: TaskData, cell: Cell, model: Model, out: Path) -> Any:
        """Of a task that is not trained on: its scores, or where it has no labels its answers in a file."""
        start = load_file(out / f"start-{cell.settings['start']}.safetensors")
        classifier = self._classifier(task, model, 0, start)
        _, dev, cut = self._rows(task, model)
        if any(split.labels is not None for split in dev.values()):
            return {**self._scored(classifier, task, dev), "cut_rows": cut}
        for name, split in dev.items():
            scores = predict(classifier, split.rows, self.device, self.precision, self.config.microbatch_tokens)
            lines = [f"{row}\t{task.classes[answer]}" for row, answer in enumerate(answers(scores, task.kind))]
            file = out / f"{cell.name.replace('/', '-')}{name and '-' + name}.tsv"
            write_file(file, "index\tprediction\n" + "\n".join(lines) + "\n")
        return {"cut_rows": cut}

    def _rows(self, task: TaskData, model: Model) -> tuple[Split | None, dict[str, Split], dict[str, int]]:
        key = (task.name, model.digest)
        if key not in self._encoded:
            tokenizer = load_tokenizer(model.folder)
            most = min(self.config.max_length, longest(model.folder, tokenizer))
            cut: dict[str, int] = {}

            def split(rows: Rows, name: str) -> Split:
                encoded, cut[name] = encode(tokenizer, rows.texts, rows.pairs, most)
                return Split(encoded, rows.labels)

            train = None if task.train is None else split(task.train, "train")
            dev = {name: split(rows, f"dev {name}".rstrip()) for name, rows in task.dev.items()}
            self._encoded = {key: (train, dev, cut)}  # of the last task only
        return self._encoded[key]

    # The table

    def scores(self, model: Model, results: Mapping[str, Any]) -> Scores:
        found: dict[str, Any] = {}
        means = []
        for task in self.tasks.values():
            if task.trained_on is not None:
                values = [results[f"{task.name}/seed{seed}"].get("score") for seed in self.config.seeds]
                if None not in values:
                    found[task.name] = over_seeds(values)
                continue
            best = self._best(task, results)
            if best is None:
                raise RunError(f"{task.name}: not all cells have results")
            of_seeds = [results[self._cell(task, best, seed).name] for seed in self.config.seeds]
            score = over_seeds([result["score"] for result in of_seeds])
            found[task.name] = score
            names = [key for key in of_seeds[0] if key.split()[0] in task.metrics]
            if len(names) > 1:
                found |= {f"{task.name} {name}": over_seeds([result[name] for result in of_seeds]) for name in names}
            means.append(score["mean"])
        return {**found, "average": math.fsum(means) / len(means)} if len(means) > 1 else found

    def scores_without_model(self) -> Mapping[str, Scores]:
        """What a run scores that has collapsed to one answer: the most frequent class of training; scores of 0 where a
        constant has none."""
        found: dict[str, Any] = {}
        for task in self.tasks.values():
            of_splits = []
            for rows in task.dev.values():
                if rows.labels is None:
                    continue
                train = task.train or self.tasks[str(task.trained_on)].train
                assert train is not None
                answer = Counter(train.labels).most_common(1)[0][0] if task.kind == "classes" else 0.0
                of_splits.append(scored(task.metrics, rows.labels, [answer] * len(rows))["score"])
            if of_splits:
                found[task.name] = math.fsum(of_splits) / len(of_splits)
        scores = [found[task.name] for task in self.tasks.values() if task.trained_on is None]
        return {
            "always one answer": {**found, "average": math.fsum(scores) / len(scores)} if len(scores) > 1 else found
        }
