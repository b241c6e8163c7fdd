"""Documents -> token shards: plan what is kept, train or load the tokenizer, tokenise in parallel, write manifests.

    list units -> scan (filter, digest, measure each document) -> plan (duplicates, near-duplicates, max_bytes, split)
               -> tokenizer -> tokenise the kept documents -> index.json, token_counts.npy, stream.json of each split

Every choice is a pure function of the texts, their order and the config, so neither the executor, nor the number of
workers, nor a kill shows in the result. OUTPUT/.work holds what a resumed run needs; it is emptied at the end.
"""

import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep
from rich.console import Console

from data.keyed import keyed_generator
from data.preparation.choice import TaskPlan, choose_documents
from data.preparation.config import CONFIG_FILE, PrepareConfig, load_prepare_config
from data.preparation.documents import ReadUnits, Scan, Select, TaskDocuments, load_task, load_tasks, numbered
from data.preparation.executors import EXECUTORS, Executor, Stage
from data.preparation.executors.local import Local
from data.preparation.executors.slurm import Slurm, check_no_jobs
from data.preparation.filters import FILTERS, DocumentFilter
from data.preparation.manifests import Reading, check_tokens, summary, write_manifest
from data.preparation.output import (
    SOURCES_FILE,
    WORK,
    check_sources,
    claim,
    clean,
    find,
    finished,
    locked,
    record,
    remove_all,
)
from data.preparation.sources import Listing, Unit
from data.preparation.sources.text import shown
from data.preparation.writing import BATCH_CHARACTERS, WriteShards, cut_text
from data.tokenizer import TOKENIZERS, save_tokenizer
from flexbert_core.durable import sync_folder, write_file
from flexbert_core.schema import ConfigError, RunError, plain_console

__all__ = ["PrepareConfig", "load_prepare_config", "prepare"]

# A task is about this much of its source: enough tasks for many workers, and little lost when one is killed. Each task
# costs some ten small files, so a stream of 10 TB gets tasks of 2.5 GB, a quarter of an hour each, and not 40,000.
_TASK_BYTES, _TASKS_PER_STREAM, _MOST_TASKS_PER_STREAM = 4 * 2**20, 64, 4096
# Tasks of a stream that a tokenizer is trained on; each costs some hundredths of a second.
_SAMPLED_TASKS = 256


def prepare(config: PrepareConfig, workers: int | None = None) -> None:
    """Make the dataset, or go on where an interrupted run of the same config stopped.

    Must be reached from under `if __name__ == "__main__"`: workers are started by forkserver.

    Args:
        workers: processes of this machine, instead of the config's executor. The result does not depend on it.
    Raises:
        ConfigError: a path matches nothing or cannot be read, the output holds something else, a stream or split is
            empty or gives no tokens, the executor cannot work here, or the sources of a finished dataset have changed.
        RunError: what a source holds cannot be read, a text is not known to the tokenizer, a worker died, the disk is
            full, or another run is preparing the same output.
    """
    start = time.monotonic()
    executor = EXECUTORS.build(config.executor) if workers is None else Local(Local.Config(workers=workers))
    try:
        executor.check()
    except ConfigError as error:
        raise ConfigError(f"{config._file}: {error}") from None
    output = Path(config.output)
    console = plain_console(stderr=True, soft_wrap=True)
    begun = claim(config, output)
    try:
        with locked(output):
            if finished(config, output):
                clean(output / WORK)
                console.print(f"{shown(str(output))}: {check_sources(config, output)}")
                return
            _make(config, output, executor, console, begun)
    except OSError as error:  # a full disk, a folder that went away
        raise RunError(f"{shown(error.filename or str(output))}: {error.strerror or error}") from error
    console.print(f"{shown(str(output))}: prepared in {time.monotonic() - start:.0f} s")


def _make(config: PrepareConfig, output: Path, executor: Executor, console: Console, begun: bool) -> None:
    """Make the dataset in its claimed folder. begun: an earlier run did."""
    work = output / WORK
    if not isinstance(executor, Slurm):  # which waits for its own
        check_no_jobs(work)
    try:
        plans = _read(config, output, executor, console)
    except ConfigError:
        if not begun:  # leave no claim that would be in the way of a corrected config
            shutil.rmtree(output / "tokenizer", ignore_errors=True)
            (output / CONFIG_FILE).unlink()
            shutil.rmtree(work)
        raise
    else:
        tokenise(config, output, plans, executor)
    finally:
        executor.stop()
    check_tokens(config, output, plans)
    made_from = json.loads((work / SOURCES_FILE).read_text(encoding="utf-8"))
    write_file(output / SOURCES_FILE, json.dumps(made_from, indent=1).encode())
    for name in config.streams:
        reading = Reading(made_from["streams"][name], work, [r for r, plan in enumerate(plans) if plan.stream == name])
        console.print(f"{name}: {reading}")
        for split in config.splits(name):
            for line in summary(write_manifest(config, output, plans, name, split, reading)):
                console.print(line)
    clean(work)


def tokenise(config: PrepareConfig, output: Path, plans: Sequence[TaskPlan], executor: Executor) -> None:
    """The stage that makes token shards of the planned documents."""
    work = output / WORK
    (work / "done").mkdir(exist_ok=True)
    sizes = [plan.kept_bytes for plan in plans]
    executor.run(Stage("tokenising", "tokenise", tokenising_steps(config, work), sizes, work))


def tokenising_steps(config: PrepareConfig, work: Path) -> list[PipelineStep]:
    """What that stage does with each task."""
    return [ReadUnits(work, meter=False), Select(work), WriteShards(work, config.shard_bytes)]


def _read(config: PrepareConfig, output: Path, executor: Executor, console: Console) -> list[TaskPlan]:
    """Everything before tokenising: tasks, scan, plan (returned, one per task) and tokenizer."""
    work = output / WORK
    executor.start()
    tasks = _tasks(config, work, console)
    # Needed later. Imported here because the parent of the workers is busy with its own imports: both cores work.
    import transformers  # noqa: F401

    (work / "scan").mkdir(exist_ok=True)
    sizes = [sum(unit[3] for unit in task["units"]) for task in tasks]
    scan = Scan(work, {name: _document_filters(config, name) for name in config.streams})
    executor.run(Stage("reading", "scan", [scan], sizes, work))

    def run(name: str, steps: Sequence[PipelineStep], sizes: Sequence[int]) -> None:
        executor.run(Stage(f"comparing ({name})", name, steps, sizes, work))

    plans = choose_documents(config, work, tasks, run)
    _make_tokenizer(config, output, plans)
    return plans


def _document_filters(config: PrepareConfig, name: str) -> list[DocumentFilter | None]:
    filters = [FILTERS.build(each) for each in config.streams[name].filters]
    return [each if isinstance(each, DocumentFilter) else None for each in filters]


def _tasks(config: PrepareConfig, work: Path, console: Console) -> list[dict[str, Any]]:
    """The fixed list of tasks. Raises RunError when an interrupted run had already begun with other source files."""
    folder = work / "tasks"
    listings: dict[str, Listing] = {}
    # Through JSON, so that they compare equal to what a resumed run finds.
    tasks = json.loads(json.dumps(list(_split_into_tasks(config, listings))))
    if folder.exists():
        begun = load_tasks(work)
        if tasks == begun:
            return tasks
        check_no_jobs(work)  # they would do other tasks than those that are listed then
        if begun and "on_error" not in begun[0]:
            console.print(f"{shown(str(work.parent))}: begun by an older version: begins anew")
            remove_all(config, work.parent)
        if (work / "plan").exists():
            raise RunError(f"{work.parent}: the sources have changed since this was begun: delete it and prepare again")
        clean(work)  # only some reading is lost
    write_file(work / SOURCES_FILE, json.dumps(record(listings, config)).encode())
    partial = work / "tasks.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for rank, task in enumerate(tasks):
        numbered(partial, rank, ".json").write_text(json.dumps(task), encoding="utf-8")
    sync_folder(partial)
    partial.rename(folder)
    return tasks


def _split_into_tasks(config: PrepareConfig, listings: dict[str, Listing]) -> Iterator[dict[str, Any]]:
    """listings: what the source of each stream holds is put there."""
    for name, stream in config.streams.items():
        source, listings[name] = find(config, name)
        units = listings[name].units
        columns = _columns(config, name, source, units)
        total = sum(unit.bytes for unit in units)
        task_bytes = min(max(total / _TASKS_PER_STREAM, _TASK_BYTES), 4 * config.shard_bytes)
        task_bytes = max(task_bytes, total / _MOST_TASKS_PER_STREAM)
        # A unit belongs to the task in which its first byte lies.
        starts = np.cumsum([0] + [unit.bytes for unit in units])[:-1]
        edges = [*np.flatnonzero(np.diff(starts // task_bytes, prepend=-1)).tolist(), len(units)]
        for part, (first, last) in enumerate(pairwise(edges)):
            yield {
                "stream": name,
                "part": part,
                "source": stream.source.model_dump(mode="json"),
                "on_error": stream.on_error,
                "columns": columns,
                "units": units[first:last],
            }


def _columns(config: PrepareConfig, name: str, source: Any, units: list[Unit]) -> list[str]:
    """Columns of the source that a stream's filters want. Raises ConfigError when it does not have them."""
    wanted: list[str] = []
    for number, each in enumerate(_document_filters(config, name)):
        where = f"{config._file}: streams.{name}.filters[{number}]"
        columns = [] if each is None else list(each.columns)
        if columns and not hasattr(source, "read_columns"):
            raise ConfigError(
                f"{where}: wants column {columns[0]!r}, but source {config.streams[name].source.name!r} has no columns"
            )
        try:
            for unit in units[:1] if columns else []:
                source.check_columns(unit, columns)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        wanted += columns
    return list(dict.fromkeys(wanted))


def _make_tokenizer(config: PrepareConfig, output: Path, plans: Sequence[TaskPlan]) -> None:
    folder = output / "tokenizer"
    if folder.exists():
        return
    builder = TOKENIZERS.build(config.tokenizer)
    try:
        tokenizer, names = builder.build(_sample(config, output / WORK, plans))
    except ConfigError as error:
        raise ConfigError(f"{config._file}: {error}") from None
    save_tokenizer(tokenizer, names, folder)


def _sample(config: PrepareConfig, work: Path, plans: Sequence[TaskPlan]) -> Iterator[str]:
    """Training text for the tokenizer, from every stream by its share.

    Of a stream it is the beginnings of many of its tasks, in keyed order, of each by its share. So it comes from all
    over the stream, whose places may differ (languages, sites, years), and little of the stream is read for it. The
    document that reaches a task's share is cut there: one may be as large as all tasks.
    """
    total = sum(plan.kept_bytes for plan in plans)
    for number, name in enumerate(config.streams):
        ranks = [rank for rank, plan in enumerate(plans) if plan.stream == name]
        budget = config.tokenizer.sample_bytes * sum(plans[rank].kept_bytes for rank in ranks) / max(total, 1)
        order = keyed_generator(config.seed, "tokenizer", number).permutation(ranks).tolist()
        there = np.cumsum([plans[rank].kept_bytes for rank in order])
        # More tasks where these hold less than twice the budget: their validation documents are not taken.
        count = max(_SAMPLED_TASKS, int(np.searchsorted(there, 2 * budget)) + 1)
        order, there = order[:count], there[:count]
        taken = 0
        for rank, until in zip(order, (budget * there / max(there[-1], 1)).tolist(), strict=True):
            for document in Select(work).run(TaskDocuments(load_task(work, rank)), rank):
                if taken >= until:
                    break
                if document.metadata["split"] == 0:
                    most = math.ceil(until - taken)
                    text = document.text
                    if document.metadata["bytes"] > most:
                        text = text[:most].encode()[:most].decode("utf-8", "ignore")
                    taken += min(document.metadata["bytes"], most)
                    yield from cut_text(text, BATCH_CHARACTERS)
