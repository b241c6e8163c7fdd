"""Small corpora, prepared in the test's own process and read back by streaming's own reader."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from streaming.base.format import reader_from_json

from data.inspect import inspect
from data.keyed import keyed_generator
from data.preparation.dataset import load_prepare_config, prepare
from data.store.manifest import StreamManifest
from data.store.shards import open_stream
from data.tokenizer import TrainedTokenizer, corpus_tokenizer
from flexbert_core.schema import ConfigError, RunError

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "[MASK]",
    "[SEP]",
    "你好",
    "café",
    "return",
    "def\n",
    "class",
    "",
    "import",
    "12",
    "345",
    ";",
]


def documents(count: int, first: int = 0) -> list[str]:
    """Distinct texts of 5 to 300 words."""
    texts = []
    for number in range(first, first + count):
        rng = keyed_generator(3, "test document", number)
        words = rng.choice(WORDS, size=int(rng.integers(5, 300)))
        texts.append(f"{number} " + " ".join(words))
    return texts


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def config_file(folder: Path, **changes: Any) -> Path:
    """Two streams, `a` (of two files) and `b`, that `folder` holds; small shards, so several tasks each."""
    node = {
        "output": str(folder / "out"),
        "validation_fraction": 0.1,
        "shard_bytes": 16384,
        "tokenizer": {"name": "train", "vocab_size": 384},
        "streams": {name: {"source": {"name": "jsonl", "paths": [str(folder / name)]}} for name in ("a", "b")},
    }
    path = folder / "prepare.yaml"
    path.write_text(yaml.safe_dump({**node, **changes}, sort_keys=False))
    return path


def run(path: Path, *overrides: str, workers: int = 1) -> Path:
    config = load_prepare_config(path, list(overrides))
    prepare(config, workers=workers)
    return Path(config.output)


def read_texts(folder: Path) -> list[str]:
    """The documents of one split in order, decoded; through streaming's own reader and index.json."""
    tokenizer = corpus_tokenizer(folder.parent.parent / "tokenizer")
    index = json.loads((folder / "index.json").read_text())
    readers = [reader_from_json(str(folder), None, shard) for shard in index["shards"]]
    samples = [reader[number]["tokens"] for reader in readers for number in range(len(reader))]
    return [tokenizer.decode(tokens.tolist(), skip_special_tokens=False) for tokens in samples]


def files(folder: Path) -> dict[str, bytes]:
    """Content of everything below a dataset but the working folder."""
    found = (path for path in folder.rglob("*") if path.is_file() and ".work" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def interrupt(path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    """Run up to the training of the tokenizer, and stop there as a kill would."""

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainedTokenizer, "build", stop)
        with pytest.raises(KeyboardInterrupt):
            run(path, *overrides)


def prepare_one(folder: Path, source: dict[str, Any], **changes: Any) -> Path:
    """Prepare one stream `s` without a validation split; gives its train folder. on_error goes to the stream."""
    stream = {"source": source, **{key: changes.pop(key) for key in ("on_error", "max_bytes") if key in changes}}
    node = {"streams": {"s": stream}, "validation_fraction": 0, "output": str(folder / "out"), **changes}
    config = load_prepare_config(config_file(folder, **node))
    prepare(config, workers=1)
    return Path(config.output) / "s" / "train"


def jsonl_source(*paths: Path | str) -> dict[str, Any]:
    return {"name": "jsonl", "paths": [str(path) for path in paths]}


def manifest_of(train: Path) -> StreamManifest:
    return open_stream(train).manifest


def error_of(folder: Path, source: dict[str, Any], **changes: Any) -> str:
    """The one line with which prepare ends."""
    with pytest.raises((ConfigError, RunError)) as caught:
        prepare_one(folder, source, **changes)
    assert str(caught.value).isprintable()
    return str(caught.value)


def shown(path: Path, samples: int = 3) -> str:
    console = Console(width=10_000, record=True, file=StringIO())
    inspect(path, samples, console)
    return console.export_text()
