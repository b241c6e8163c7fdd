"""Rows of labelled sentences or pairs, from TSV, CSV, jsonl or parquet files, or from the hub's `datasets`."""

import csv
import hashlib
import io
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import ConfigError

log = logging.getLogger(__name__)
_SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")
# Official files hold a few rows with other columns (QQP's train: quotation marks that nobody closed).
_MOST_BROKEN = 0.01
_LONGEST_FIELD = 2**31 - 1  # the module's own limit is 131,072 characters


@dataclass(frozen=True)
class Columns:
    """Where a row's texts and label stand: names in the header, or numbers from 0 where there is none."""

    text: str | int
    pair: str | int | None
    label: str | int | None

    def named(self) -> list[str | int]:
        return [column for column in (self.text, self.pair, self.label) if column is not None]


@dataclass(frozen=True)
class Rows:
    """Texts, second texts (or None), and labels as they stand (or None)."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[Any] | None

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def digest(self) -> str:
        """Of all that stands there, whatever files and columns it was read from."""
        none = [None] * len(self)
        digest = hashlib.sha256()
        for row in zip(self.texts, self.pairs or none, self.labels or none, strict=True):
            digest.update(json.dumps(row, default=str).encode() + b"\n")
        return digest.hexdigest()


def read_rows(file: Path, columns: Columns) -> Rows:
    """Of one file, by its suffix. Raises ConfigError naming file and column, or the first bad row."""
    if file.suffix not in _SUFFIXES:
        raise ConfigError(f"{file}: expected one of {', '.join(_SUFFIXES)}")
    if not file.is_file():
        near = sorted(path.name for path in file.parent.glob("*") if path.is_file()) if file.parent.is_dir() else []
        raise ConfigError(f"{file}: no such file" + (f"; there are: {', '.join(near)}" if near else ""))
    try:
        return _collected(_records(file, columns), columns, str(file))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is no UTF-8 text: {error.reason}, byte {error.start}") from None


def rows_of_hub(name: str, subset: str | None, split: str, columns: Columns) -> Rows:
    """Of a dataset of the Hugging Face hub, or a folder in its form: the only place here that may use the network."""
    try:
        from datasets import load_dataset

        table: Any = load_dataset(name, subset, split=split)
    except ImportError:
        raise ConfigError("hub: needs the package datasets: make setup-eval, or give a folder as `data`") from None
    except Exception as error:  # the library raises many kinds
        said = " ".join(str(error).split())[:300]
        raise ConfigError(f"{name} {subset or ''} {split}: cannot be had: {said}") from None
    place = f"{name}/{subset} {split}" if subset else f"{name} {split}"
    return _collected(enumerate(table, 1), columns, place)


def score_of(label: Any, place: str) -> float:
    """A label as a score. Raises ConfigError for what is no finite number: its correlations would have no value."""
    try:
        score = float(label)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise ConfigError(f"{place}: {label!r} is no number")
    return score


def _collected(records: "Iterator[tuple[int, Any]]", columns: Columns, place: str) -> Rows:
    texts: list[str] = []
    pairs: list[str] = []
    labels: list[Any] = []
    for number, record in records:
        found = [_value(record, column, place, number) for column in columns.named()]
        for column, value in zip(columns.named(), found, strict=True):
            if column != columns.label and not isinstance(value, str):
                raise ConfigError(f"{place}: row {number}: {column}: expected text, got {value!r}")
        texts.append(found.pop(0))
        if columns.pair is not None:
            pairs.append(found.pop(0))
        if columns.label is not None:
            labels.append(found.pop(0))
    if not texts:
        raise ConfigError(f"{place}: holds no rows")
    return Rows(texts, pairs if columns.pair is not None else None, labels if columns.label is not None else None)


def _value(record: Any, column: str | int, place: str, number: int) -> Any:
    if isinstance(column, int):
        if not 0 <= column < len(record):
            raise ConfigError(f"{place}: row {number}: has {len(record)} columns, so none of number {column} (from 0)")
        return record[column]
    if column not in record:
        raise ConfigError(f"{place}: row {number}: no column {column!r}, {did_you_mean(column, map(str, record))}")
    return record[column]


def _records(file: Path, columns: Columns) -> Iterator[tuple[int, Any]]:
    """Row numbers, as an editor shows them where rows are lines, and rows: mappings, or lists where columns are
    numbers."""
    has_header = not any(isinstance(column, int) for column in columns.named())
    if file.suffix in (".tsv", ".csv"):
        yield from _separated(file, has_header)
        return
    if not has_header:
        raise ConfigError(f"{file}: columns are named here: give names, not numbers")
    if file.suffix == ".parquet":
        import pyarrow.parquet as parquet

        try:
            table = parquet.read_table(file)
        except Exception as error:
            raise ConfigError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
        yield from enumerate(table.to_pylist(), 1)
        return
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{file}:{number}: not valid JSON: {error}") from None
            if not isinstance(record, dict):
                raise ConfigError(f"{file}:{number}: expected an object, got {type(record).__name__}")
            yield number, record


def _separated(file: Path, has_header: bool) -> Iterator[tuple[int, Any]]:
    """TSV by bare tabs, where `"` is a character like others; CSV with quotes."""
    # MRPC's begin with a byte-order mark. Line ends stay as they are: a CSV's texts may hold some.
    with file.open(encoding="utf-8-sig", newline="") as handle:
        text = handle.read()
    if file.suffix == ".tsv":
        split = [line.rstrip("\r").split("\t") for line in text.split("\n")]
        lines = [(number, line) for number, line in enumerate(split, 1) if line != [""]]
    else:
        lines = list(_quoted(text, file))
    if not lines:
        return
    header = lines[0][1] if has_header else None
    width = len(lines[0][1])
    broken = [(number, len(line)) for number, line in lines if len(line) != width]
    if len(broken) > _MOST_BROKEN * len(lines):
        raise ConfigError(f"{file}:{broken[0][0]}: {broken[0][1]} columns, in the first line {width}")
    if broken:
        log.warning(
            "%s: %d rows have other columns and are left out, the first in line %d", file, len(broken), broken[0][0]
        )
    for number, line in lines[1:] if header is not None else lines:
        if len(line) == width:
            yield number, dict(zip(header, line, strict=True)) if header is not None else line


def _quoted(text: str, file: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV that hold something, with the lines where they begin. Strict: else a quotation mark that nobody
    closed would make one text of all rows behind it."""
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    begin = 1
    try:
        for row in reader:
            if row:
                yield begin, row
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(f"{file}:{begin}: is no CSV: {error}") from None
