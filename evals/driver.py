"""Evaluates models: each cell once, here or as jobs, and goes on where it was interrupted.

OUTPUT/NAME/MODEL/ holds a model's results of one evaluation, whatever else a command evaluates: cells/*.json with a
result and the key of what it depends on, failed/*.txt with what kept a cell from one, logs/, files/ of the evaluation's
own, and results.json.
"""

import contextlib
import hashlib
import json
import math
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from evals.interface import Cell, CelledEval, Eval, EvalFile, Model
from evals.models import plain
from evals.packages import versions
from flexbert_core.durable import lock, write_file
from flexbert_core.schema import ConfigError, RunError, named_paths
from jobs.base import JOBS, Job, JobExecutor, told

MAIN = Path(__file__).parent.parent / "main.py"
_WHOLE = "all"
_CELLS, _SCORES = "its cells", "its scores"  # in `failed`: what the evaluation could not say of the model


@dataclass(frozen=True)
class Task:
    """One evaluation of one model."""

    name: str
    evaluation: Eval
    model: Model
    folder: Path
    versions: dict[str, set[str]] = field(default_factory=dict)
    """Of packages: those that its results were computed with, as far as it has read them."""

    @property
    def files(self) -> Path:
        return self.folder / "files"

    def cells(self, results: Mapping[str, Any]) -> list[Cell]:
        """Those known so far."""
        if isinstance(self.evaluation, CelledEval):
            return list(self.evaluation.cells(self.model, results))
        config = self.evaluation.config
        data = {key: _hash(path) for key, path in named_paths(config).items() if path.exists()}
        return [Cell(_WHOLE, {**config.model_dump(mode="json"), "hashes of files": data})]

    def key(self, cell: Cell) -> str:
        return f"{cell.key(self.model)}-{self.evaluation.version}"

    def compute(self, cell: Cell) -> Any:
        self.files.mkdir(parents=True, exist_ok=True)
        if isinstance(self.evaluation, CelledEval):
            return self.evaluation.compute(cell, self.model, self.files)
        return self.evaluation.run(self.model, self.files)

    def scores(self, results: Mapping[str, Any]) -> Mapping[str, Any]:
        if isinstance(self.evaluation, CelledEval):
            return self.evaluation.scores(self.model, results)
        return results[_WHOLE]

    def file(self, cell: Cell, kind: str = "cells") -> Path:
        suffix = ".json" if kind == "cells" else ".txt"
        return self.folder / kind / f"{cell.name}-{self.key(cell)}{suffix}"

    def result(self, cell: Cell) -> tuple[bool, Any]:
        """Whether the cell has one, and it. One of other settings, or of another model, is none."""
        file = self.file(cell)
        if not file.is_file():
            return False, None
        try:
            node = json.loads(file.read_text())
            result = node["result"]
        except (ValueError, KeyError):
            raise RunError(f"{file}: damaged: remove it, and it is computed again") from None
        self.note(node.get("versions", {"of cells before 2026-12": "not noted"}))
        return True, result

    def note(self, versions: Mapping[str, str]) -> None:
        for name, each in versions.items():
            self.versions.setdefault(name, set()).add(each)

    def failure(self, cell: Cell) -> str | None:
        file = self.file(cell, "failed")
        return file.read_text().strip() if file.is_file() else None


@dataclass
class Outcome:
    """Of a task: results by cell, scores where there is a result of each, and what failed by cell."""

    task: Task
    results: dict[str, Any]
    scores: Mapping[str, Any] | None
    failed: dict[str, str]


def task_folder(output: Path, name: str, model: Model) -> Path:
    """OUTPUT/NAME/MODEL: of the model alone, since models of one name, or other weights of it, may come by turns."""
    return output / name / f"{plain(model.name or model.label)}-{model.digest[:8]}"


def evaluate(
    name: str,
    config: EvalFile,
    evaluation: Eval,
    models: Sequence[Model],
    output: Path,
    again: Sequence[str],
    console: Console,
) -> list[Outcome]:
    """Compute what is missing. again: the command's arguments that lead other processes here, without models.

    Raises RunError when two processes evaluate one model at once. A cell that fails stops nothing, and neither does an
    evaluation that says no cells or scores of a model; a later command tries it again.
    """
    tasks = [Task(name, evaluation, model, task_folder(output, name, model)) for model in models]
    for task in tasks:
        _take_over(output / name / plain(task.model.label), task)
    executor: JobExecutor | None = None if config.executor is None else JOBS.build(config.executor)
    if executor is not None:
        executor.check()
    done: list[dict[str, Any]] = [{} for _ in tasks]
    failed: list[dict[str, str]] = [{} for _ in tasks]
    while True:
        todo = [_todo(task, done[i], failed[i], console) for i, task in enumerate(tasks)]
        if not any(todo):
            break
        if executor is None:
            for i, task in enumerate(tasks):
                _run_here(task, todo[i], done[i], failed[i], console)
        else:
            for i, task in enumerate(tasks):
                for cell in todo[i]:  # what an earlier command said of it is not what becomes of it now
                    task.file(cell, "failed").unlink(missing_ok=True)
            jobs = {  # one for two models of the same name and bytes
                (task.folder, group): _job(task, group, again, output)
                for i, task in enumerate(tasks)
                for group in _groups(todo[i])
            }
            _run_jobs(executor, list(jobs.values()), console)
            for i, task in enumerate(tasks):
                for cell in todo[i]:
                    there, result = task.result(cell)
                    if there:
                        done[i][cell.name] = result
                    else:
                        failed[i][cell.name] = task.failure(cell) or "its job ended without a word: see logs/"
    return [
        Outcome(task, done[i], _scores(task, done[i], failed[i], console), failed[i]) for i, task in enumerate(tasks)
    ]


def run_group(name: str, evaluation: Eval, model: Model, output: Path, group: str, console: Console) -> bool:
    """Life of a job: compute the missing cells of a group. Whether all of them went well."""
    task = Task(name, evaluation, model, task_folder(output, name, model))
    done: dict[str, Any] = {}
    failed: dict[str, str] = {}
    todo = [cell for cell in _todo(task, done, failed, console) if cell.group == group]
    _run_here(task, todo, done, failed, console, group)
    return not failed


def _take_over(older: Path, task: Task) -> None:
    """Give a folder as it was called before 2026-12, by the label alone, its name of today. It may hold other weights'
    results, too, which are then computed again."""
    if older.is_dir() and not task.folder.exists():
        files = [older / "results.json", *older.glob("cells/**/*.json")]
        if any(file.is_file() and f'"digest": "{task.model.digest}"' in file.read_text() for file in files):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                older.rename(task.folder)


def _hash(path: Path) -> str:
    """Of a file's bytes, or of those of all files in a folder."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            digest.update(f"{file.relative_to(path)}\n".encode() + hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:16]


def _todo(task: Task, done: dict[str, Any], failed: dict[str, str], console: Console) -> list[Cell]:
    """What can be computed now and has no result; what has one is put into `done`, what has no readable one, and an
    evaluation that cannot say its cells, into `failed`."""
    while _CELLS not in failed:
        try:
            cells = task.cells(done)
            names = [cell.name for cell in cells]
            assert len(set(names)) == len(names), f"{task.name}: two cells have one name: {names}"
        except Exception as error:
            failed[_CELLS] = _warn(task, _CELLS, one_line(error), console)
            break
        found = 0
        todo = []
        for cell in cells:
            if cell.name in done or cell.name in failed:
                continue
            try:
                there, result = task.result(cell)
            except RunError as error:
                failed[cell.name] = _fail(task, cell, str(error), console)
                continue
            if there:
                done[cell.name] = result
                found += 1
            else:
                todo.append(cell)
        if todo or not found:
            return todo
    return []


def _scores(task: Task, done: Mapping[str, Any], failed: dict[str, str], console: Console) -> Mapping[str, Any] | None:
    if failed:
        return None
    try:
        return task.scores(done)
    except Exception as error:
        failed[_SCORES] = _warn(task, _SCORES, one_line(error), console)
        return None


def _groups(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.group for cell in cells))


def _run_here(
    task: Task,
    todo: Sequence[Cell],
    done: dict[str, Any],
    failed: dict[str, str],
    console: Console,
    group: str = "",
) -> None:
    if not todo:
        return
    task.folder.mkdir(parents=True, exist_ok=True)
    with lock(
        task.folder / f".lock{'-' + plain(group) if group else ''}",
        task.folder,
        "evaluating it",
    ):
        for cell in todo:
            there, result = task.result(cell)  # of a process that held the lock before
            if not there:
                start = time.monotonic()
                task.evaluation.say = partial(_say, console, f"{task.name}  {task.model.label}  {cell.name}")
                try:
                    result = task.compute(cell)
                    seconds = time.monotonic() - start
                    _write(task, cell, result, seconds)
                except Exception as error:  # an evaluation's own fault, or a full disk, costs its cell, not the others
                    failed[cell.name] = _fail(task, cell, one_line(error), console)
                    continue
                if cell.name != _WHOLE:
                    console.print(
                        f"{task.name}  {task.model.label}  {cell.name}  {_shown(result)}({seconds:.0f} s)",
                        soft_wrap=True,
                    )
            done[cell.name] = result


def _say(console: Console, where: str, text: str) -> None:
    console.print(f"{where}: {text}", soft_wrap=True)


def _shown(result: Any) -> str:
    """The numbers of a cell's result that lie on top, for its line."""
    if not isinstance(result, Mapping):
        return ""
    numbers = [
        f"{key} {value:,}" if isinstance(value, int) else f"{key} {value:.4g}"
        for key, value in result.items()
        if isinstance(value, int | float)
    ][:6]
    return ", ".join(numbers) + "  " if numbers else ""


def _write(task: Task, cell: Cell, result: Any, seconds: float) -> None:
    """Raises RunError for a result with a number that JSON has not, ValueError and TypeError for what else it has not,
    OSError."""
    if (found := next(_not_finite(result, "result"), None)) is not None:
        raise RunError(f"{found}: a result holds finite numbers, and None for one that is not known")
    file = task.file(cell)
    file.parent.mkdir(parents=True, exist_ok=True)
    node = {
        "cell": cell.name,
        "settings": dict(cell.settings),
        "model": {"source": task.model.source, "digest": task.model.digest},
        "versions": versions(),
        "seconds": round(seconds, 2),
        "result": result,
    }
    write_file(file, json.dumps(node, indent=1, allow_nan=False, default=str) + "\n")
    task.note(node["versions"])
    task.file(cell, "failed").unlink(missing_ok=True)


def _not_finite(node: Any, key: str) -> Iterator[str]:
    if isinstance(node, float) and not math.isfinite(node):
        yield f"{key} is {node}"
    elif isinstance(node, Mapping | list | tuple):
        for name, each in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from _not_finite(each, f"{key}.{name}")


def one_line(error: Exception) -> str:
    """One line; of what is no error of ours the traceback goes to stderr, too."""
    if isinstance(error, RunError | ConfigError):
        return str(error)
    traceback.print_exception(error, file=sys.stderr)
    return " ".join(f"{type(error).__name__}: {error}".split())


def _fail(task: Task, cell: Cell, message: str, console: Console) -> str:
    file = task.file(cell, "failed")
    with contextlib.suppress(OSError):  # a full disk may be what failed
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, message + "\n")
    return _warn(task, cell.name, message, console)


def _warn(task: Task, what: str, message: str, console: Console) -> str:
    console.print(f"warning: {task.name}  {task.model.label}  {what}: {message}", soft_wrap=True)
    return message


def _job(task: Task, group: str, again: Sequence[str], output: Path) -> Job:
    log = task.folder.resolve() / "logs" / f"{plain(group)}.log"
    command = [sys.executable, str(MAIN), "eval", *again, task.model.source, "--output", str(output), "--group", group]
    return Job(f"{task.name} {task.model.label} {group}", [*command, "--label", task.model.label], log)


def _run_jobs(executor: JobExecutor, jobs: Sequence[Job], console: Console) -> None:
    executor.run(jobs, told(jobs, partial(console.print, soft_wrap=True), executor.begun))
