"""Documents -> token shards: plan what is kept, train or load the tokenizer, tokenise in parallel, write manifests.

    list units -> scan (filter, digest, measure each document) -> plan (duplicates, near-duplicates, max_bytes, split)
               -> tokenizer -> tokenise the kept documents -> index.json, token_counts.npy, stream.json of each split

Every choice is a pure function of the texts, their order and the config, so neither the executor, nor the number of
workers, nor a kill shows in the result. OUTPUT/.work holds what a resumed run needs; it is emptied at the end.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep

from data.choice import TaskPlan, choose_documents, filter_labels
from data.documents import SPLITS, ReadUnits, Scan, Select, load_arrays, numbered
from data.executors import EXECUTORS, Executor, Stage
from data.executors.local import Local
from data.filters import FILTERS, DocumentFilter
from data.keyed import keyed_generator
from data.pipeline import WriteShards, token_dtype
from data.plan import CONFIG_FILE, PrepareConfig, load_prepare_config
from data.shards import CHUNKS, MANIFEST, StreamManifest, pack_chunks
from data.sources import SOURCES, Unit
from data.tokenizer import TOKENIZERS, save_tokenizer, tokenizer_facts
from durable import lock, write_file
from schema import ConfigError, RunError, plain_console

__all__ = ["PrepareConfig", "load_prepare_config", "prepare"]

_WORK = ".work"
# A task is about this much of its source: enough tasks for many workers, and little lost when one is killed. Each task
# costs some ten small files, so a stream of 10 TB gets tasks of 2.5 GB, a quarter of an hour each, and not 40,000.
_TASK_BYTES, _TASKS_PER_STREAM, _MOST_TASKS_PER_STREAM = 4 * 2**20, 64, 4096


def prepare(config: PrepareConfig, workers: int | None = None) -> None:
    """Make the dataset, or go on where an interrupted run of the same config stopped.

    Must be reached from under `if __name__ == "__main__"`: workers are started by forkserver.

    Args:
        workers: processes of this machine, instead of the config's executor. The result does not depend on it.
    Raises:
        ConfigError: a path matches nothing, the output holds something else, a stream ends up empty, the executor
            cannot work here.
        RunError: a source cannot be read, a worker died, or another run is preparing the same output.
    """
    start = time.monotonic()
    executor = EXECUTORS.build(config.executor) if workers is None else Local(Local.Config(workers=workers))
    try:
        executor.check()
    except ConfigError as error:
        raise ConfigError(f"{config._file}: {error}") from None
    output, console = Path(config.output), plain_console(stderr=True, soft_wrap=True)
    begun = _claim(config, output)
    with _lock(output):
        work = output / _WORK
        if _finished(config, output):
            _clean(work)
            console.print(f"{output}: already prepared")
            return
        try:
            plans = _read(config, output, executor)
            tokenise(config, output, plans, executor)
        except ConfigError:
            if not begun:  # leave no claim that would be in the way of a corrected config
                shutil.rmtree(output / "tokenizer", ignore_errors=True)
                (output / CONFIG_FILE).unlink()
                shutil.rmtree(work)
            raise
        finally:
            executor.stop()
        for name in config.streams:
            for split in config.splits(name):
                manifest = _merge(config, output, plans, name, split)
                dropped = {"duplicates": manifest.duplicate_documents, **manifest.filtered}
                console.print(
                    f"{name}/{split}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
                    f"{manifest.bytes / 1e6:.1f} MB; dropped: "
                    + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
                )
        _clean(work)
    console.print(f"{output}: prepared in {time.monotonic() - start:.0f} s")


def tokenise(config: PrepareConfig, output: Path, plans: Sequence[TaskPlan], executor: Executor) -> None:
    """The stage that makes token shards of the planned documents."""
    work = output / _WORK
    (work / "done").mkdir(exist_ok=True)
    sizes = [plan.kept_bytes for plan in plans]
    executor.run(Stage("tokenising", "tokenise", tokenising_steps(config, work), sizes, work))


def tokenising_steps(config: PrepareConfig, work: Path) -> list[PipelineStep]:
    """What that stage does with each task."""
    return [ReadUnits(work, meter=False), Select(work), WriteShards(work, config.shard_bytes)]


def _read(config: PrepareConfig, output: Path, executor: Executor) -> list[TaskPlan]:
    """Everything before tokenising: tasks, scan, plan (returned, one per task) and tokenizer."""
    work = output / _WORK
    executor.start()
    tasks = _tasks(config, work)
    # Needed later. Imported here because the parent of the workers is busy with its own imports: both cores work.
    import transformers  # noqa: F401

    (work / "scan").mkdir(exist_ok=True)
    sizes = [sum(unit[3] for unit in task["units"]) for task in tasks]
    steps = [
        ReadUnits(work, columns=True),
        Scan(work, {name: _document_filters(config, name) for name in config.streams}),
    ]
    executor.run(Stage("reading", "scan", steps, sizes, work))

    def run(name: str, steps: Sequence[PipelineStep], sizes: Sequence[int]) -> None:
        executor.run(Stage(f"comparing ({name})", name, steps, sizes, work))

    plans = choose_documents(config, work, tasks, run)
    _make_tokenizer(config, output, tasks, plans)
    return plans


def _document_filters(config: PrepareConfig, name: str) -> list[DocumentFilter | None]:
    filters = [FILTERS.build(each) for each in config.streams[name].filters]
    return [each if isinstance(each, DocumentFilter) else None for each in filters]


def _claim(config: PrepareConfig, output: Path) -> bool:
    """Write the config into the output folder, or see that the same one is there; gives whether it was."""
    wanted = config.model_dump(mode="json", exclude={"output", "executor"})
    file = output / CONFIG_FILE
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        differences = _differences(found, wanted)
        if differences:
            raise ConfigError(
                f"{config._file}: output: {output} was prepared with another config ({'; '.join(differences)}): "
                "choose another output, or delete that folder"
            )
        return True
    if output.exists() and (not output.is_dir() or any(path.name != _WORK for path in output.iterdir())):
        raise ConfigError(f"{config._file}: output: {output} exists and is no dataset of ours: choose another folder")
    (output / _WORK).mkdir(parents=True, exist_ok=True)
    write_file(file, json.dumps(wanted, indent=1).encode())
    return False


def _differences(found: Any, wanted: Any, key: str = "") -> list[str]:
    if key == "streams" and set(found) == set(wanted) and list(found) != list(wanted):
        # the order of the streams decides which copy of a document is the first
        return [f"{key}: the order was {', '.join(found)}, is {', '.join(wanted)}"]
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [
            name
            for name in {**found, **wanted}
            if found.get(name) != wanted.get(name) or isinstance(found.get(name), dict)
        ]
        return [
            line
            for name in keys
            for line in _differences(found.get(name), wanted.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if found == wanted else [f"{key} was {found!r}, is {wanted!r}"]


@contextmanager
def _lock(output: Path) -> Iterator[None]:
    work = output / _WORK
    work.mkdir(exist_ok=True)
    handle = lock(work / "lock", output, "preparing this folder")
    try:
        yield
    finally:
        handle.close()


def _finished(config: PrepareConfig, output: Path) -> bool:
    return all((output / name / split / MANIFEST).exists() for name in config.streams for split in config.splits(name))


def _clean(work: Path) -> None:
    """Remove what only an unfinished run needs; the log stays."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("lock", "prepare.log"):
            path.unlink()


def _tasks(config: PrepareConfig, work: Path) -> list[dict[str, Any]]:
    """The fixed list of tasks. Raises RunError when an interrupted run had already begun with other source files."""
    folder = work / "tasks"
    # Through JSON, so that they compare equal to what a resumed run finds.
    tasks = json.loads(json.dumps(list(_split_into_tasks(config))))
    if folder.exists():
        if tasks == [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]:
            return tasks
        if (work / "plan").exists():
            raise RunError(f"{work.parent}: the sources have changed since this was begun: delete it and prepare again")
        _clean(work)  # only some reading is lost
    partial = work / "tasks.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for rank, task in enumerate(tasks):
        numbered(partial, rank, ".json").write_text(json.dumps(task), encoding="utf-8")
    partial.rename(folder)
    return tasks


def _split_into_tasks(config: PrepareConfig) -> Iterator[dict[str, Any]]:
    for name, stream in config.streams.items():
        source = SOURCES.build(stream.source)
        try:
            units = source.units()
        except ConfigError as error:
            raise ConfigError(f"{config._file}: streams.{name}.source.{error}") from None
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


def _make_tokenizer(
    config: PrepareConfig, output: Path, tasks: list[dict[str, Any]], plans: Sequence[TaskPlan]
) -> None:
    folder = output / "tokenizer"
    if folder.exists():
        return
    builder = TOKENIZERS.build(config.tokenizer)
    try:
        tokenizer, names = builder.build(_sample(config, output / _WORK, tasks, plans))
    except ConfigError as error:
        raise ConfigError(f"{config._file}: {error}") from None
    save_tokenizer(tokenizer, names, folder)


def _sample(config: PrepareConfig, work: Path, tasks: list[dict[str, Any]], plans: Sequence[TaskPlan]) -> Iterator[str]:
    """Training documents for the tokenizer, from every stream by its share: tasks in keyed order, up to the budget."""
    total = sum(plan.kept_bytes for plan in plans)
    for number, name in enumerate(config.streams):
        ranks = [rank for rank, plan in enumerate(plans) if plan.stream == name]
        budget = config.tokenizer.sample_bytes * sum(plans[rank].kept_bytes for rank in ranks) / max(total, 1)
        for rank in keyed_generator(config.seed, "tokenizer", number).permutation(ranks).tolist():
            source = SOURCES.build(config.streams[name].source)
            documents = (text for unit in tasks[rank]["units"] for text in source.read(Unit(*unit)))
            splits = load_arrays(numbered(work / "plan", rank, ".npz"))["splits"]
            for text, split in zip(documents, splits, strict=False):
                if split == 0 and budget > 0:
                    budget -= len(text.encode("utf-8", "surrogatepass"))
                    yield text
                if budget <= 0:
                    break
            if budget <= 0:
                break


def _merge(
    config: PrepareConfig,
    output: Path,
    plans: Sequence[TaskPlan],
    name: str,
    split: str,
) -> StreamManifest:
    """Write index.json, token_counts.npy and, last, stream.json of one split of one stream."""
    folder, work = output / name / split, output / _WORK
    facts = tokenizer_facts(output / "tokenizer")
    ranks = [rank for rank, plan in enumerate(plans) if plan.stream == name]
    reports = [json.loads(numbered(work / "done", rank, ".json").read_text(encoding="utf-8"))[split] for rank in ranks]
    shards = [shard for report in reports for shard in report["shards"]]
    counts = np.zeros(facts.vocab_size, np.uint64)
    chunks = []
    for rank in ranks:
        arrays = load_arrays(numbered(work / "done", rank, ".npz"))
        counts += arrays[split]
        chunks.append(arrays[f"{split}_chunks"])
    chunk_file, chunk_digest = pack_chunks(chunks)
    histogram = np.zeros(64, np.int64)
    for report in reports:
        histogram[: len(report["length_histogram"])] += report["length_histogram"]
    manifest = StreamManifest(
        schema_version=2,
        name=name,
        split=split,
        dtype=token_dtype(facts.vocab_size),  # pyright: ignore[reportArgumentType]
        tokenizer_fingerprint=facts.fingerprint,
        **facts.model_dump(exclude={"fingerprint"}),
        documents=sum(report["documents"] for report in reports),
        tokens=sum(report["tokens"] for report in reports),
        bytes=sum(report["bytes"] for report in reports),
        empty_documents=sum(report["empty_documents"] for report in reports),
        duplicate_documents=sum(plans[rank].duplicates[SPLITS.index(split)] for rank in ranks),
        filtered={
            label: sum(plans[rank].filtered[label][SPLITS.index(split)] for rank in ranks)
            for label in filter_labels(config, name)
        },
        length_histogram={str(2**power): int(count) for power, count in enumerate(histogram) if count},
        source=config.streams[name].source.model_dump(mode="json"),
        chunk_documents=json.loads((work / "plan" / f"{name}.json").read_text(encoding="utf-8"))[split],
        chunks_xxh3_64=chunk_digest,
        shards=[
            {  # pyright: ignore[reportArgumentType]
                "file": shard["raw_data"]["basename"],
                "documents": shard["samples"],
                "tokens": shard.pop("tokens"),
                "bytes": shard["raw_data"]["bytes"],
                "xxh3_64": shard["raw_data"]["hashes"]["xxh3_64"],
                "header_xxh3_64": shard.pop("header_xxh3_64"),
            }
            for shard in shards
        ],
    )
    for leftover in folder.glob(".*.partial"):
        shutil.rmtree(leftover)
    write_file(folder / "index.json", json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode())
    array = BytesIO()
    np.save(array, counts)
    write_file(folder / "token_counts.npy", array.getvalue())
    write_file(folder / CHUNKS, chunk_file)
    write_file(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
    return manifest
