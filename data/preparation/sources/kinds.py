"""What files are by their names and first bytes: of which format, and how compressed."""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""What is read here."""
UNKNOWN = (
    *(".lz4", ".br", ".zip", ".7z", ".rar", ".z", ".lzma", ".lz", ".lzo", ".sz", ".snappy", ".zstd"),
    *(".tar", ".tgz", ".tbz2", ".txz", ".tzst"),
)
"""What is not; of data with such a name it is said, instead of passing it over."""
FORMATS = (
    (b"\x1f\x8b", ".gz"),
    *((b"BZh%d1AY&SY" % level, ".bz2") for level in range(1, 10)),
    (b"\xfd7zXZ\0", ".xz"),
    (b"\x28\xb5\x2f\xfd", ".zst"),
    *((bytes([first]) + b"\x2a\x4d\x18", ".zst") for first in range(0x50, 0x60)),  # a frame to skip comes first
    (b"\x04\x22\x4d\x18", ".lz4"),
    (b"PK\x03\x04", ".zip"),
    (b"7z\xbc\xaf\x27\x1c", ".7z"),
    (b"Rar!\x1a\x07", ".rar"),
    (b"PAR1\x15", "parquet"),
    (b"ARROW1\0\0", "Arrow"),
)
"""First bytes, and what they say."""


class Kinds(NamedTuple):
    """Which files below a folder are read."""

    groups: Sequence[Sequence[str]]
    """Suffixes in lower case. Those of a later group are read only where a folder holds none of an earlier one."""
    compressed: Sequence[str] | None
    """Suffixes that may follow; files whose name goes on with another one are refused. None: they are other files."""
    ignore_dirs: Sequence[str]

    def group(self, name: str) -> int | None:
        """Number of the group that a file's name falls into; None: it is not read."""
        lower = name.lower()
        endings = [""] if self.compressed is None else ["", *COMPRESSED, *UNKNOWN]
        for number, suffixes in enumerate(self.groups):
            if any(lower.endswith(suffix + ending) for suffix in suffixes for ending in endings):
                return number
        return None

    def refused(self, path: str) -> str | None:
        """The suffix that says that a file is packed in a way which is not read here."""
        stem, suffix = os.path.splitext(path.lower())  # noqa: PTH122 (also URLs)
        if self.compressed is None or suffix not in (*COMPRESSED, *UNKNOWN):
            return None
        if stem.endswith(".tar"):
            return ".tar" + suffix
        return None if suffix in self.compressed else suffix

    def __str__(self) -> str:
        suffixes = [f"*{suffix}" for suffixes in self.groups for suffix in suffixes]
        return ", ".join(suffixes) if len(suffixes) < 6 else f"{', '.join(suffixes[:5])}, ..."


def compression_of(path: str) -> str | None:
    """The suffix of a compressed file that can be read, in lower case."""
    suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122 (also URLs)
    return suffix if suffix in COMPRESSED else None


def suffix_of(name: str) -> str:
    """The reason for which a file of another kind is left out: its suffix, with that of a compression."""
    stem, suffix = os.path.splitext(os.path.basename(name))  # noqa: PTH119, PTH122
    if suffix.lower() in (*COMPRESSED, *UNKNOWN):
        suffix = os.path.splitext(stem)[1] + suffix  # noqa: PTH122
    if not suffix:
        return "no suffix"
    return f"*{suffix.lower()}" if re.fullmatch(r"[.A-Za-z0-9_-]{2,16}", suffix) else "other suffix"
