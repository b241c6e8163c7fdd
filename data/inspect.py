"""Show what a prepared dataset holds: counts, lengths, integrity, and a few documents in plain text."""

import json
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from data.keyed import keyed_generator
from data.store.cache import CacheConfig
from data.store.local import refused
from data.store.manifest import CHUNKS, MANIFEST
from data.store.shards import Stream, open_stream
from data.store.transfer import is_url
from data.tokenizer import corpus_tokenizer, fingerprint
from flexbert_core.folders import what_it_is
from flexbert_core.schema import ConfigError, RunError, plain_console

_BAR_COLUMNS = 40
_SHOWN_TOKENS = 200
_READ_BYTES = 2**20
_NAMED = 3  # damaged files of a stream
_COUNTS = "token_counts.npy"
_BESIDE = (CHUNKS, _COUNTS, "index.json")  # files of a finished split, beside its manifest and its shards
_UNFINISHED = "{}: not finished: run `python main.py prepare CONFIG` again to complete it"


def inspect(path: str | Path, samples: int = 3, console: Console | None = None) -> None:
    """Print a summary of every stream below `path` (a folder or URL): one split, a stream, or a whole dataset.

    Args:
        samples: documents shown of each split; the same ones at every call.
    Raises:
        ConfigError: there is no stream, or an unfinished one.
        RunError: something is damaged; raised after all that can be shown is.
    """
    console = console or plain_console()
    streams = [open_stream(place) for place in (_find_remote(str(path)) if is_url(path) else _find_streams(Path(path)))]
    faults: dict[str, list[str]] = {}
    console.print(_overview(streams, faults))
    for stream in streams:
        try:
            _show(stream, samples, console)
        except RunError as error:
            console.print(Text(str(error), "red"))
            faults.setdefault(_name(stream), [str(error)])
    if faults:
        said = "; ".join(f"{name}: {_some(found)}" for name, found in faults.items())
        # Behind a URL what is wrong may be the network.
        fix = "" if is_url(path) else ": restore it, or delete the stream's folder and run prepare again"
        raise RunError(f"{path}: damaged: {said}{fix}")


def _some(found: list[str]) -> str:
    """What of it a line has room for."""
    more = f" and {len(found) - _NAMED:,} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more


def _name(stream: Stream) -> str:
    return f"{stream.manifest.name}/{stream.manifest.split}"


def _find_streams(path: Path) -> list[Path]:
    """Folders with a manifest at most two levels down. Raises ConfigError when there is none, or one is unfinished."""
    levels = ("", "*/", "*/*/")
    try:
        if not path.is_dir():
            raise ConfigError(f"{path}: no such folder: give a dataset that `python main.py prepare` made")
        for folder in (path, *(folder for level in levels[1:] for folder in path.glob(level))):
            os.scandir(folder).close()  # glob passes over what it may not read
    except OSError as error:
        raise refused(Path(error.filename or path), error, "it is there no more: start again") from None
    found = sorted(file.parent for level in levels for file in path.glob(f"{level}{MANIFEST}"))
    if not found:
        kind = what_it_is(path)
        if kind == "a run":
            raise ConfigError(f"{path}: this is a run: give --step N to see what a step trained on")
        if kind is not None:
            raise ConfigError(f"{path}: this is {kind}, no dataset: give what `python main.py prepare` wrote")
        raise ConfigError(
            f"{path}: holds no {MANIFEST}: run `python main.py prepare CONFIG` to make or complete a dataset"
        )
    traces = (file for level in levels for trace in ("part-*", *_BESIDE) for file in path.glob(f"{level}{trace}"))
    for trace in sorted(traces):
        if trace.parent not in found and not trace.parent.name.startswith("part-"):
            raise ConfigError(_UNFINISHED.format(trace.parent))
    return found


def _find_remote(url: str) -> list[str]:
    """The same behind a URL, as far as it can be listed."""
    from data.store.remote import list_files

    url = url.rstrip("/")
    files = [name.split("/") for name in list_files(url, CacheConfig()) if name.count("/") <= 2]
    found = ["/".join([url, *parts[:-1]]) for parts in files if parts[-1] == MANIFEST]
    for *folders, name in files:
        place = "/".join([url, *folders])
        if name in _BESIDE and place not in found and not place.rpartition("/")[2].startswith("part-"):
            raise ConfigError(_UNFINISHED.format(place))
    return found or [url]


def _overview(streams: list[Stream], faults: dict[str, list[str]]) -> Table:
    """faults: what is damaged of which stream is put there."""
    # Five columns that stay legible on a terminal of 80.
    table = Table("stream")
    for column in ("documents", "tokens", "bytes/token", "shards"):
        table.add_column(column, justify="right", no_wrap=column != "shards")
    for stream in streams:
        manifest = stream.manifest
        remote = is_url(stream.path)
        damaged = _damaged_beside(stream) + (_wrong_sizes(stream) if remote else _damaged(stream))
        if damaged:
            faults[_name(stream)] = damaged
        good = Text("of the right size" if remote else "good", "green")
        state = Text(f"damaged: {', '.join(damaged)}", "red") if damaged else good
        table.add_row(
            Text(_name(stream)),
            f"{manifest.documents:,}",
            f"{manifest.tokens:,}",
            f"{manifest.bytes / max(manifest.tokens, 1):.2f}",
            Text(f"{len(manifest.shards):,} ") + state,
        )
    return table


def _wrong_sizes(stream: Stream) -> list[str]:
    """What of the sizes behind a URL is wrong first; hashes would cost a download of it all."""
    try:
        stream.check_files()
    except RunError as error:
        return [str(error)]
    return []


def _damaged_beside(stream: Stream) -> list[str]:
    """Those of the small files beside the manifest that are missing or not what was written."""
    damaged = []
    manifest = stream.manifest
    for name in _BESIDE:
        try:
            content = stream.files.read(name)
            if name == CHUNKS:
                good = xxhash.xxh3_64_hexdigest(content) == manifest.chunks_xxh3_64
            elif name == _COUNTS:
                counts = np.load(BytesIO(content), allow_pickle=False)
                good = counts.shape == (manifest.vocab_size,) and int(counts.sum()) == manifest.tokens
            else:
                good = len(json.loads(content)["shards"]) == len(manifest.shards)
        except (ConfigError, RunError, ValueError, EOFError, KeyError, TypeError, OSError):
            good = False
        if not good:
            damaged.append(name)
    return damaged


def _damaged(stream: Stream) -> list[str]:
    """Shards that are missing or whose content is not what was written."""
    damaged = []
    for shard in stream.manifest.shards:
        try:
            with os.fdopen(stream.files.open(shard), "rb") as file:
                digest = xxhash.xxh3_64()
                while block := file.read(_READ_BYTES):
                    digest.update(block)
            whole = digest.hexdigest() == shard.xxh3_64
        except RunError:
            whole = False
        if not whole:
            damaged.append(shard.file)
    return damaged


def _show(stream: Stream, samples: int, console: Console) -> None:
    manifest = stream.manifest
    console.rule(Text(f"{manifest.name}/{manifest.split}"))
    folder, state = _tokenizer(stream)
    for line in _facts(stream, state):
        console.print(line, markup=False)  # a path may hold brackets
    console.print("\ndocuments by length in tokens")
    most = max(manifest.length_histogram.values(), default=1)
    for edge, count in sorted(manifest.length_histogram.items(), key=lambda item: int(item[0])):
        bar = "#" * max(1, round(_BAR_COLUMNS * count / most))
        console.print(f"  {int(edge):>9,}+ {bar:<{_BAR_COLUMNS}} {count:,}")
    if not samples or folder is None:
        return
    tokenizer = corpus_tokenizer(folder)
    edges = np.cumsum([0] + [shard.documents for shard in manifest.shards])
    for number in shown_documents(manifest.documents, samples):
        shard = int(np.searchsorted(edges, number, side="right")) - 1
        tokens = stream.document(shard, number - int(edges[shard]))
        text = tokenizer.decode(tokens[:_SHOWN_TOKENS].tolist(), skip_special_tokens=False)
        more = f" ... ({len(tokens) - _SHOWN_TOKENS:,} more tokens)" if len(tokens) > _SHOWN_TOKENS else ""
        console.print(
            Panel(Text(text + more), title=f"document {number:,}: {len(tokens):,} tokens", title_align="left")
        )


def shown_documents(documents: int, samples: int) -> list[int]:
    """Numbers of some of a split's documents, ascending and always the same ones; in memory for those alone."""
    return sorted(keyed_generator(0, "inspect").choice(documents, min(samples, documents), replace=False).tolist())


def _facts(stream: Stream, tokenizer: str) -> list[str]:
    """Where a stream comes from, and what became of all that was there. tokenizer: what to say of it."""
    manifest = stream.manifest
    lines = [
        f"source     {_one_line(manifest.source)}",
        f"tokenizer  {manifest.vocab_size:,} ids ({manifest.dtype}), {tokenizer}",
        f"text       {manifest.bytes / 1e6:,.1f} MB; {manifest.duplicate_documents:,} duplicates and "
        f"{manifest.empty_documents:,} empty documents left out",
    ]
    dropped = {**manifest.filtered, "over max_bytes": manifest.over_max_bytes}
    if any(dropped.values()):
        lines.append(f"filtered   {', '.join(f'{count:,} {why}' for why, count in dropped.items() if count)}")
    if manifest.unknown_tokens is not None:
        share = 100 * manifest.unknown_tokens / max(manifest.tokens, 1)
        lines.append(f"unknown    {manifest.unknown_tokens:,} tokens ({share:.2f} %)")
    if manifest.read is not None:
        skipped = [f"{count:,} {why}" for kind in manifest.skipped.values() for why, count in kind.items()]
        read = f"{manifest.read['documents']:,} documents from {manifest.read['files']:,} files"
        lines.append(f"read       {read}; skipped: {', '.join(skipped) or 'nothing'} (of the whole stream)")
    return lines


def _one_line(source: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in source.items() if value is not None)


def _tokenizer(stream: Stream) -> tuple[Path | None, str]:
    """The tokenizer's folder beside the stream, if it can be read, and what to say of it."""
    place = f"{stream.path.rsplit('/', 2)[0]}/tokenizer" if is_url(stream.path) else ""
    place = place or str(Path(stream.path).resolve().parent.parent / "tokenizer")
    try:
        folder = _fetched(place) if is_url(place) else Path(place)
    except (ConfigError, RunError) as error:
        return None, f"cannot be read: {error}"
    if folder is None or not folder.exists():
        return None, f"not found beside the stream ({place})"
    try:
        matches = fingerprint(folder) == stream.manifest.tokenizer_fingerprint
    except OSError as error:
        return None, f"cannot be read: {error.filename}: {error.strerror}"
    return folder, place if matches else f"{place} is not the one that made this stream"


def _fetched(url: str) -> Path | None:
    """A local copy of a tokenizer's folder, None where there is none."""
    from data.store.remote import TOKENIZER_FILES, RemoteFiles, fetch_tokenizer

    there = RemoteFiles(url, CacheConfig()).find(TOKENIZER_FILES[0]) is not None
    return fetch_tokenizer(url, CacheConfig()) if there else None
