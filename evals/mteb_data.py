"""Retrieval tasks of mteb as sets: names for what lies on the Hugging Face hub. mteb's own data, our own scoring."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from evals.beir import Judged, RetrievalSet, join_title
from flexbert_core.schema import ConfigError


def read_mteb(name: str, splits: Sequence[str]) -> RetrievalSet:
    """The set of a task, NAME or NAME:SUBSET. Uses the network, but for what the hub's client has kept.

    Raises ConfigError for a name that is no retrieval task of text, a subset or split it lacks, and data that cannot be
    had.
    """
    import mteb
    from mteb.abstasks import AbsTaskRetrieval

    if len(splits) > 1:
        raise ConfigError(f"mteb: {name}: tasks are scored, not trained on: give {splits[1]} as a folder, or triples")
    task_name, _, subset = name.partition(":")
    try:
        task: Any = mteb.get_task(task_name, hf_subsets=[subset] if subset else None)
    except (KeyError, ValueError) as error:
        said = str(error.args[0]).removeprefix("KeyError: ")
        raise ConfigError(f"mteb: {name}: {said}") from None
    if not issubclass(type(task), AbsTaskRetrieval):
        raise ConfigError(f"mteb: {name}: is a task of {task.metadata.type}, not of retrieval")
    if len(task.hf_subsets) > 1:
        raise ConfigError(f"mteb: {name}: has subsets: write {name}:SUBSET; they are: {', '.join(task.hf_subsets)}")
    if splits[0] not in task.eval_splits:
        raise ConfigError(f"mteb: {name}: split: no {splits[0]!r}; there are: {', '.join(task.eval_splits)}")
    task.filter_eval_splits([splits[0]])
    return set_of_task(task, subset or task.hf_subsets[0], splits[0], name.replace(":", "-"))


def set_of_task(task: Any, subset: str, split: str, name: str) -> RetrievalSet:
    """What a retrieval task of mteb holds. Raises ConfigError when it cannot be loaded, or holds no text."""
    try:
        task.load_data()
        task.convert_v1_dataset_format_to_v2(num_proc=None)
        data = task.dataset[subset][split]
        documents = {row["id"]: join_title(row.get("title") or "", row["text"]) for row in data["corpus"]}
        queries = {row["id"]: row["text"] for row in data["queries"]}
    except Exception as error:  # the hub's clients raise many kinds
        said = " ".join(str(error).split())[:300]
        raise ConfigError(f"mteb: {name}: cannot be had: {type(error).__name__}: {said}") from None
    relevance = {
        query: {document: int(score) for document, score in row.items()}
        for query, row in data["relevant_docs"].items()
        if query in queries and row
    }
    digest = hashlib.sha256(json.dumps([documents, queries, relevance], sort_keys=True).encode()).hexdigest()[:16]
    judged = Judged({query: queries[query] for query in relevance}, relevance)
    return RetrievalSet(name, documents, {split: judged}, digest, bool(task.ignore_identical_ids))
