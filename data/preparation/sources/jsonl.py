"""JSON lines."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import orjson
from pydantic import Field

from data.preparation.sources.base import SOURCES, LineError, Listing, Unit, line_units, listing, read_lines, texts
from data.preparation.sources.files import Fault, find_files
from data.preparation.sources.text import kind_of, not_utf8, shown, to_text
from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import Component, ConfigError, RunError, UserPath


@SOURCES.register("jsonl")
class Jsonl:
    """One JSON object a line, plain or .gz, .bz2, .xz, .zst; the document is one of its columns.

    A null is an empty document. Of a key that a row holds twice the last counts. NaN and Infinity are numbers.
    """

    class Config(Component):
        name: Literal["jsonl"] = "jsonl"
        paths: list[UserPath] = Field(
            min_length=1,
            description="files, folders (all *.jsonl and *.ndjson below; where there is none, all *.json) or globs, "
            "also URLs",
        )
        text_column: str = "text"
        """The column that holds the document."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def find(self) -> Listing:
        return listing(find_files(self.config.paths, [".jsonl", ".ndjson"], otherwise=[".json"]), line_units)

    def check_columns(self, unit: Unit, names: Sequence[str]) -> None:
        """Looks at the first row."""
        try:
            row = next((row for _, row in self._rows(unit) if isinstance(row, dict)), None)
        except RunError:  # reading will say it
            return
        for name in names:
            if row is not None and name not in row:
                raise ConfigError(f"no column {name!r} in {shown(unit.path)}, {did_you_mean(name, row)}")

    def read(self, unit: Unit) -> Iterator[str | Fault]:
        return texts(self.read_columns(unit, ()))

    def read_columns(self, unit: Unit, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]] | Fault]:
        column = self.config.text_column
        for index, row in self._rows(unit):
            if isinstance(row, Fault):
                yield row
                continue
            text = row.get(column, self) if isinstance(row, dict) else self
            if isinstance(text, str) and all(name in row for name in names):
                yield text, {name: row[name] for name in names}
            elif text is None and all(name in row for name in names):
                yield "", {name: row[name] for name in names}
            else:
                reason, message = _fault(row, column, names)
                yield Fault(reason, partial(_error, unit, index, message))

    def _rows(self, unit: Unit) -> Iterator[tuple[int, Any]]:
        """The values of the lines that are not blank, or a Fault, with the lines' numbers in the unit."""
        for index, line in enumerate(read_lines(unit)):
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            if not line:
                continue
            try:
                yield index, orjson.loads(line)
            except orjson.JSONDecodeError as error:
                yield index, _lenient(line, partial(_error, unit, index), f"not valid JSON: {error}")


def _lenient(line: bytes, error: Callable[[str], Exception], message: str) -> Any:
    """What Python's parser, which takes NaN and lone surrogates, makes of a line that orjson refuses; else a Fault."""
    try:
        text = to_text(line)
    except UnicodeDecodeError as fault:
        return Fault("not UTF-8", partial(error, not_utf8(line, fault)))
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        hint = "; expected one object a line" if line in (b"[", b"{", b"[{") else ""
        return Fault("not valid JSON", partial(error, message + hint))


def _error(unit: Unit, index: int, message: str) -> RunError:
    return LineError(unit.path, unit.start, index, shown(message))


def _fault(row: object, column: str, names: Sequence[str]) -> tuple[str, str]:
    """What is wrong with a row: kind, and the whole of it."""
    if not isinstance(row, dict):
        hint = ", one a line (to convert: jq -c '.[]' FILE)" if isinstance(row, list) else ""
        return f"row is {kind_of(row)}", f"expected a JSON object, got {kind_of(row)}{hint}"
    if column not in row:
        hint = did_you_mean(column, row)
        return f"no column {column!r}", f"no column {column!r}, {hint} (source key text_column)"
    if row[column] is not None and not isinstance(row[column], str):
        kind = kind_of(row[column])
        return f"text is {kind}", f"column {column!r} holds {kind}, expected a string"
    name = next(name for name in names if name not in row)
    return f"no column {name!r}", f"no column {name!r}, {did_you_mean(name, row)}"
