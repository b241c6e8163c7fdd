"""Rows, and what a source reads of them."""

import bz2
import gzip
import json
import lzma
from typing import Any

import zstandard

from data.preparation.sources import SOURCES, Fault

ROWS = [{"text": f"row {number}: " + "word " * number, "other": number} for number in range(50)]

TEXTS = [row["text"] for row in ROWS]


def build(node: dict[str, Any]) -> Any:
    return SOURCES.build(SOURCES.parse(node))


def read_all(node: dict[str, Any]) -> list[str]:
    """The documents of a source; the first fault is raised, as on_error: fail does."""
    source = build(node)
    found = source.find()
    faults = [*found.faults, *(row for unit in found.units for row in source.read(unit) if isinstance(row, Fault))]
    for fault in faults:
        if fault.error is not None:
            raise fault.error()
    return [row for unit in found.units for row in source.read(unit) if not isinstance(row, Fault)]


def jsonl(rows: list[dict[str, Any]] = ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def two_frames(content: bytes) -> bytes:
    half = len(content) // 2
    return zstandard.compress(content[:half]) + zstandard.compress(content[half:])


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": two_frames}
