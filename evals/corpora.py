"""Text to measure on: the validation split of a prepared dataset, or files by the names of their domains."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from pydantic import Field

from evals.interface import EvalConfig
from flexbert_core.schema import ConfigError, RunError, UserPath, named

_JSON = (".jsonl", ".ndjson", ".json")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


class CorpusConfig(EvalConfig):
    """What evaluations of running text say of it."""

    data: UserPath | None = Field(
        default=None, description="a prepared dataset: the validation split of each of its streams is a domain"
    )
    texts: dict[str, UserPath] | None = Field(
        default=None, min_length=1, description="files by domain: .jsonl or text, plain or .gz, .bz2, .xz, .zst"
    )
    text_column: str = Field(default="text", description="of .jsonl files")
    document: Literal["file", "paragraph", "line"] = Field(
        default="paragraph", description="what one is, of text files"
    )
    documents: int = Field(default=1000, ge=1, description="of each domain at most, its first")


@dataclass(frozen=True)
class Corpus:
    """Documents of one domain. digest: of their texts."""

    texts: list[str]
    digest: str


def read_corpora(config: CorpusConfig) -> dict[str, Corpus]:
    """Documents of each domain, those that are not blank. Raises ConfigError for what cannot be read or holds none."""
    if (config.data is None) == (config.texts is None):
        raise ConfigError("give data=FOLDER, a prepared dataset, or texts.NAME=FILE, and not both")
    if config.texts is not None:
        found = {name: _of_file(file, config) for name, file in config.texts.items()}
    else:
        found = _of_dataset(Path(str(config.data)))
    corpora = {}
    for name, documents in found.items():
        place = f"texts.{name}" if config.texts is not None else f"data: {config.data}: {name}"
        with named(place):
            texts = list(islice((text for text in documents if text.strip()), config.documents))
        if not texts:
            raise ConfigError(f"{place}: holds no text")
        corpora[name] = Corpus(texts, digest_of_texts(texts))
    return corpora


def digest_of_texts(texts: list[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()[:16]


def _of_file(file: str, config: CorpusConfig) -> Iterator[str]:
    from data.preparation.sources import SOURCES, Fault

    plain = Path(file)
    plain = plain.with_suffix("") if plain.suffix in _COMPRESSED else plain
    kind = {"name": "jsonl", "text_column": config.text_column}
    if plain.suffix not in _JSON:
        kind = {"name": "txt", "document": config.document}
    source = SOURCES.build(SOURCES.parse({**kind, "paths": [file]}))
    try:
        listing = source.find()
        for each in chain(listing.faults, chain.from_iterable(map(source.read, listing.units))):
            if not isinstance(each, Fault):
                yield each
            elif each.error is not None:
                raise each.error()
    except RunError as error:
        raise ConfigError(str(error)) from None


def _of_dataset(folder: Path) -> Mapping[str, Iterator[str]]:
    streams = sorted(path.parent.parent for path in folder.glob("*/validation/stream.json"))
    if not streams:
        near = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        fault = f"holds no stream with a validation split, only {', '.join(near[:8])}" if near else "no such dataset"
        raise ConfigError(f"data: {folder}: {fault}: give what `python main.py prepare` wrote, or texts.NAME=FILE")
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        raise ConfigError(f"data: {folder}: holds no tokenizer/tokenizer.json, which tells what its tokens are")
    return {path.name: _of_stream(path, folder / "tokenizer") for path in streams}


def _of_stream(path: Path, tokenizer_folder: Path) -> Iterator[str]:
    """Documents decoded, so that models with other tokenizers see the same text."""
    from data.store.shards import open_stream
    from data.tokenizer import corpus_tokenizer, tokenizer_facts

    stream = open_stream(path / "validation")
    if tokenizer_facts(tokenizer_folder).fingerprint != stream.manifest.tokenizer_fingerprint:
        raise ConfigError(f"was made with another tokenizer than {tokenizer_folder}")
    tokenizer = corpus_tokenizer(tokenizer_folder)
    for shard, info in enumerate(stream.manifest.shards):
        for number in range(info.documents):
            yield tokenizer.decode(stream.document(shard, number).tolist(), skip_special_tokens=True)


_WORD = re.compile(r"\S+")


def pieces(texts: list[str], words: int, most: int) -> list[str]:
    """Pieces of so many words, as blanks part them, at most `most` in all: the first of each document, then the second
    of each, and so on, so that a few long documents are not all of it."""
    spans = [[match.span() for match in _WORD.finditer(text)] for text in texts]
    found: list[str] = []
    for first in range(0, max(map(len, spans)), words):
        for text, bounds in zip(texts, spans, strict=True):
            if first < len(bounds):
                found.append(text[bounds[first][0] : bounds[min(first + words, len(bounds)) - 1][1]])
                if len(found) == most:
                    return found
    return found
