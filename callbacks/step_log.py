"""Files of JSON lines that belong to steps: metrics.jsonl, ledger.jsonl and evaluations.jsonl."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flexbert_core.composing import leaves
from flexbert_core.durable import write_file

log = logging.getLogger(__name__)


def append_line(file: Path, line: dict[str, Any]) -> None:
    """Add a line, in one piece. What a kill or a full disk has torn before stays a line of its own."""
    with file.open("a+b") as out:
        end = out.seek(0, os.SEEK_END)
        out.seek(max(end - 1, 0))
        torn = out.read(1) not in (b"", b"\n")
        out.write(b"\n" * torn + json.dumps(line).encode() + b"\n")


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """All lines; one that is being written, or torn by a kill, is left out. None when there is no file."""
    for line in file.read_text().splitlines() if file.exists() else []:
        if step_of(line) < float("inf"):
            yield json.loads(line)


def trim_lines(file: Path, step: int, keep: Callable[[str], bool] = lambda line: False) -> None:
    """Drop the lines of later steps but those to keep, and one torn by a kill. Synced: a machine that is lost just then
    must not take the rest with it."""
    lines = file.read_text().splitlines() if file.exists() else []
    kept = [line for line in lines if step_of(line) <= step or keep(line)]
    write_file(file, "".join(line + "\n" for line in kept))


class StepLines:
    """The lines that a run adds to one of these files. A full disk does not end the run: a line that cannot be written
    waits for the next one, which is said once, until there is room again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.waiting: list[dict[str, Any]] = []
        self._is_said = False

    def append(self, line: dict[str, Any]) -> None:
        """Write a line behind those that wait, or let it wait with them."""
        self.waiting.append(line)
        self.write()

    def write(self) -> None:
        """Write what waits, as far as there is room."""
        try:
            while self.waiting:
                append_line(self.file, self.waiting[0])
                del self.waiting[0]
            self._is_said = False
        except OSError as error:
            if not self._is_said:
                why = error.strerror or error
                log.error("%s: NOT WRITTEN, training goes on: %s: its lines wait until there is room", self.file, why)
            self._is_said = True

    def close(self) -> None:
        """Write what waits; say what is lost."""
        self.write()
        if self.waiting:
            log.error("%s: %d lines could not be written, and are lost", self.file, len(self.waiting))

    def trim(self, step: int, keep: Callable[[str], bool] = lambda line: False) -> None:
        """As `trim_lines`, of what waits, too."""
        self.waiting = [line for line in self.waiting if line["step"] <= step]
        trim_lines(self.file, step, keep)


def flat(node: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The numbers in nested mappings under names for loggers: PREFIX/loss, PREFIX/streams/NAME/loss, ...

    None, which says that a number is not known, becomes NaN.
    """
    numbers = leaves(node, "/", prefix).items()
    known = {name: value for name, value in numbers if value is None or isinstance(value, int | float)}
    return {name: math.nan if value is None else value for name, value in known.items()}


def nested(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`: `a/b/c` becomes {a: {b: {c: ...}}}; a name that goes through another's value keeps its
    slashes from there on."""
    node: dict[str, Any] = {}
    for name, value in metrics.items():
        parts, place = name.split("/"), node
        while len(parts) > 1 and isinstance(place.setdefault(parts[0], {}), dict):
            place = place[parts.pop(0)]
        key = "/".join(parts)
        if isinstance(place.get(key), dict):  # a name that is the beginning of others
            node[name] = value
        else:
            place[key] = value
    return node


def shown(value: float | None, form: str) -> str:
    """A figure for people; a dash for one of nothing, such as the loss where no token was to be predicted."""
    return "-" if value is None else format(value, form)


def step_of(line: str) -> float:
    """The step of a line; infinite for one torn by a kill."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")
