"""Retrieval sets: folders in BEIR's layout, and files of triples to train on.

    corpus.jsonl        {"_id": "7", "title": "...", "text": "..."}    title: may be empty or left out
    queries.jsonl       {"_id": "q1", "text": "..."}                   of all splits
    qrels/SPLIT.tsv     query-id <tab> corpus-id <tab> score           with that header; scores are whole numbers

The layout is that of arXiv 2104.08663 (github.com/beir-cellar/beir).
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.keyed import keyed_generator
from flexbert_core.schema import ConfigError

log = logging.getLogger(__name__)
_HEADER = ["query-id", "corpus-id", "score"]
# Some of BEIR's own sets judge a few documents that their corpus has lost. More than that is another corpus.
_MOST_LOST = 0.01

Relevance = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Judged:
    """Queries of a split by id, and for each of them scores of documents by id; 0: not relevant."""

    queries: Mapping[str, str]
    relevance: Relevance


@dataclass(frozen=True)
class RetrievalSet:
    """A corpus by id, with titles before texts; the splits that were asked for; the hash of all that.

    ignore_identical_ids: queries are documents, so that each finds itself.
    """

    name: str
    documents: Mapping[str, str]
    splits: Mapping[str, Judged]
    digest: str
    ignore_identical_ids: bool = False


@dataclass(frozen=True)
class Example:
    """A query to train on, a document that answers it, and documents that don't."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()


def read_beir(folder: Path, splits: Sequence[str]) -> RetrievalSet:
    """A folder with these of its splits.

    Raises ConfigError naming file and line for what is missing or is not as it should be.
    """
    if not folder.is_dir():
        raise ConfigError(f"data: {folder}: no such folder")
    corpus, questions = folder / "corpus.jsonl", folder / "queries.jsonl"
    of_splits = {split: folder / "qrels" / f"{split}.tsv" for split in splits}
    for file in (corpus, questions, *of_splits.values()):
        if not file.is_file():
            there = sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))
            hint = f"; its splits: {', '.join(there)}" if file.suffix == ".tsv" and there else ""
            raise ConfigError(f"{file}: no such file: a folder in BEIR's layout has it{hint}")
    documents = read_corpus(corpus)
    queries = {key: _text(node, "text", place, False) for key, node, place in _nodes(questions)}
    digest = hashlib.sha256()
    for file in (corpus, questions, *of_splits.values()):
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    judged = {split: _judged(file, queries, documents) for split, file in of_splits.items()}
    return RetrievalSet(folder.resolve().name, documents, judged, digest.hexdigest()[:16])


def read_corpus(file: Path) -> dict[str, str]:
    """Its documents by id, titles before texts. Raises ConfigError naming file and line."""
    return {
        key: join_title(_text(node, "title", place, True), _text(node, "text", place, False))
        for key, node, place in _nodes(file)
    }


def join_title(title: str, text: str) -> str:
    """A document as models read it."""
    return " ".join(part for part in (title.strip(), text.strip()) if part)


def refuse_identical(data: RetrievalSet, split: str) -> None:
    """Raises ConfigError where queries of a split are documents themselves, by id and text, as ArguAna's and Quora's
    are: each finds itself first, which scores of others leave out."""
    queries = data.splits[split].queries
    same = [
        name
        for name, text in queries.items()
        if text.strip() and _words(data.documents.get(name, "")).endswith(_words(text))  # behind its title
    ]
    if same:
        raise ConfigError(
            f"data: {data.name}: {len(same)} of {len(queries)} queries are documents themselves, such as {same[0]!r}: "
            "give ignore_identical_ids=true to leave them out of what they find, or false"
        )


def _words(text: str) -> str:
    return " ".join(text.split())


def sampled(data: RetrievalSet, split: str, documents: int | None, queries: int | None, seed: int) -> RetrievalSet:
    """With fewer queries in a split, and fewer documents: those that are judged for the queries left, and others up to
    the number wanted. Its scores compare with nothing but scores of the same sample."""
    splits = dict(data.splits)
    judged = splits[split]
    if queries is not None and queries < len(judged.queries):
        order = keyed_generator(seed, "queries of a sample").permutation(len(judged.queries))[:queries]
        names = list(judged.queries)
        chosen = [names[row] for row in sorted(order)]
        splits[split] = Judged(
            {name: judged.queries[name] for name in chosen}, {name: judged.relevance[name] for name in chosen}
        )
    kept = data.documents
    if documents is not None and documents < len(kept):
        needed = {name for each in splits.values() for row in each.relevance.values() for name in row}
        others = [name for name in kept if name not in needed]
        order = keyed_generator(seed, "documents of a sample").permutation(len(others))
        needed |= {others[row] for row in order[: max(documents - len(needed), 0)]}
        kept = {name: text for name, text in kept.items() if name in needed}
    return replace(data, documents=kept, splits=splits)


def read_triples(file: Path) -> list[Example]:
    """Queries, positives and negatives: TSV without header as MS MARCO has it (2 or more columns), or jsonl with
    `query`, `positive`, and `negative`, a text or a list of them. All have as many negatives as the one with the
    fewest: a batch needs them alike.

    Raises ConfigError naming file and line, as for one without negatives among others that have some.
    """
    if not file.is_file():
        raise ConfigError(
            f"tune.examples: {file}: no such file: write train for the folder's own split, or a .tsv or .jsonl"
        )
    if file.suffix not in (".tsv", ".jsonl"):
        raise ConfigError(f"tune.examples: {file}: expected a .tsv or .jsonl file of queries, positives and negatives")
    found: list[Example] = []
    lines: list[int] = []
    for number, line in _lines(file):
        lines.append(number)
        place = f"{file}:{number}"
        if file.suffix == ".tsv":
            parts = line.split("\t")
            if len(parts) < 2 or not all(part.strip() for part in parts):
                raise ConfigError(
                    f"{place}: expected query, positive and negatives between tabs, got {len(parts)} texts"
                )
            found.append(Example(parts[0], parts[1], tuple(parts[2:])))
            continue
        node = _object(line, place)
        negatives = node.get("negative", [])
        negatives = [negatives] if isinstance(negatives, str) else negatives
        if not isinstance(negatives, list) or not all(isinstance(each, str) for each in negatives):
            raise ConfigError(f"{place}: negative: expected a text or a list of texts")
        query, positive = (_text(node, key, place, False) for key in ("query", "positive"))
        found.append(Example(query, positive, tuple(negatives)))
    if not found:
        raise ConfigError(f"{file}: holds no triples")
    counts = [len(example.negatives) for example in found]
    fewest, most = min(counts), max(counts)
    if fewest < most:
        place = f"{file}:{lines[counts.index(fewest)]}"
        if fewest == 0:
            raise ConfigError(
                f"{place}: has no negative, where others have up to {most}: give it some, or leave it out"
            )
        log.warning("%s: has %d negatives, others up to %d: %d are taken of each", place, fewest, most, fewest)
    return [replace(example, negatives=example.negatives[:fewest]) for example in found]


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines that hold something, with their numbers. Only line feeds end lines: texts may hold other separators."""
    try:
        with file.open(encoding="utf-8", newline="\n") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is no UTF-8 text: {error.reason}, byte {error.start} of a block") from None


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        node = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place}: not valid JSON: {error}") from None
    if not isinstance(node, dict):
        raise ConfigError(f"{place}: expected an object, got {type(node).__name__}")
    return node


def _text(node: Mapping[str, Any], key: str, place: str, optional: bool) -> str:
    value = node.get(key, "" if optional else None)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise ConfigError(
            f"{place}: {key}: expected text, got {value!r}" if key in node else f"{place}: has no {key!r}"
        )
    return value


def _nodes(file: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Ids, objects and places of a jsonl file."""
    seen: set[str] = set()
    for number, line in _lines(file):
        place = f"{file}:{number}"
        node = _object(line, place)
        key = _text(node, "_id", place, False)
        if key in seen:
            raise ConfigError(f"{place}: _id: {key!r} stands there twice")
        seen.add(key)
        yield key, node, place
    if not seen:
        raise ConfigError(f"{file}: holds nothing")


def _judged(file: Path, queries: Mapping[str, str], documents: Mapping[str, str]) -> Judged:
    relevance: dict[str, dict[str, int]] = {}
    lost, first_lost, count = 0, "", 0
    for number, line in _lines(file):
        parts, place = line.split("\t"), f"{file}:{number}"
        if number == 1:
            if parts != _HEADER:
                raise ConfigError(f"{place}: expected the header {' <tab> '.join(_HEADER)}, got {line!r}")
            continue
        if len(parts) != 3:
            raise ConfigError(f"{place}: expected 3 columns between tabs, got {len(parts)}")
        query, document, score = parts
        if query not in queries:
            raise ConfigError(f"{place}: query-id: {query!r} is not in queries.jsonl")
        try:
            relevance.setdefault(query, {})[document] = int(score)
        except ValueError:
            raise ConfigError(f"{place}: score: expected a whole number, got {score!r}") from None
        count += 1
        if document not in documents:
            lost += 1
            first_lost = first_lost or f"{place}: corpus-id: {document!r} is not in corpus.jsonl"
    if not relevance:
        raise ConfigError(f"{file}: judges nothing")
    if lost > _MOST_LOST * count:
        raise ConfigError(f"{first_lost}, as {lost} of {count}: it is of another corpus")
    if lost:
        log.warning("%s; %d of %d: they count as not found", first_lost, lost, count)
    return Judged({name: queries[name] for name in relevance}, relevance)
