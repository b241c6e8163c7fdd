"""Tagged words in CoNLL's column files: a word with its tag a line, blank lines between sentences."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from flexbert_core.schema import ConfigError

_TAG = re.compile(r"O|[BIES](-.+)?")


@dataclass(frozen=True)
class TaggedSentences:
    """Words and tags of each sentence; digest: of the file."""

    words: list[list[str]]
    tags: list[list[str]]
    digest: str


def read_conll(file: Path, word_column: int = 0, tag_column: int = -1) -> TaggedSentences:
    """Columns are parted by tabs where a line has some, else by spaces; lines of -DOCSTART- and comments (# without a
    tag) are left out. Raises ConfigError naming the line."""
    if not file.is_file():
        near = sorted(path.name for path in file.parent.glob("*") if path.is_file()) if file.parent.is_dir() else []
        raise ConfigError(f"{file}: no such file" + (f"; there are: {', '.join(near[:12])}" if near else ""))
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is no UTF-8 text: {error.reason}, byte {error.start}") from None
    words: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip("\r")
        # By spaces alone: words hold other blanks, such as the no-break space of 10 000.
        columns = line.split("\t") if "\t" in line else [column for column in line.split(" ") if column]
        is_comment = columns[:1] == ["#"] and not _TAG.fullmatch(columns[-1])
        if not line.strip() or columns[0].startswith("-DOCSTART-") or is_comment:
            if words[-1]:
                words.append([])
                tags.append([])
            continue
        try:
            word, tag = columns[word_column], columns[tag_column]
        except IndexError:
            fault = f"has {len(columns)} columns, so none of number {max(word_column, tag_column)} (from 0)"
            raise ConfigError(f"{file}:{number}: {fault}") from None
        if not _TAG.fullmatch(tag):
            raise ConfigError(f"{file}:{number}: {tag!r} is no tag: expected O, or B-, I-, E- or S- and a type")
        words[-1].append(word)
        tags[-1].append(tag)
    if not words[-1]:
        words.pop()
        tags.pop()
    if not words:
        raise ConfigError(f"{file}: holds no sentences")
    return TaggedSentences(words, tags, hashlib.sha256(data).hexdigest()[:16])
