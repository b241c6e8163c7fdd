"""Where words begin, as a tokenizer's vocabulary tells: two edges for each id, computed once.

A word is what WordPiece marks by `##`. Where a vocabulary marks blanks instead (byte-level BPE, Metaspace), it is a run
of letters and digits, or a run of other signs, without a blank in it; each ideograph is a word, as in BERT
(arXiv 1810.04805, its tokenizer). Bytes that begin inside a character belong to what stands before them.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_APART, _LETTERS, _SIGNS, _ANY = range(4)
Edges = tuple[int, int]


@dataclass(frozen=True)
class WordEdges:
    """Edges of each id, (vocab_size,) int8. An id of left edge 0 begins a word; one of 3 belongs to the word of the
    token before it, another where that token's right edge is the same. Nothing goes on behind a right edge of 0."""

    left: NDArray[np.int8]
    right: NDArray[np.int8]

    def first_tokens(self, ids: NDArray[np.unsignedinteger], row_ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each token of rows laid end to end the place where its word begins, (tokens,). row_ends: (rows,)."""
        left, before = self.left[ids], np.concatenate([np.zeros(1, np.int8), self.right[ids[:-1]]])[: len(ids)]
        goes_on = (left != _APART) & (before != _APART) & ((left == _ANY) | (left == before))
        goes_on[row_ends[row_ends < len(ids)]] = False
        return np.maximum.accumulate(np.where(goes_on, 0, np.arange(len(ids))))


def word_edges(folder: Path, special: NDArray[np.bool_]) -> WordEdges:
    """Of a saved tokenizer. special: (vocab_size,), ids that stand apart from every word.

    Raises ValueError for a tokenizer whose vocabulary does not tell where words begin.
    """
    file = folder / "tokenizer.json"
    found = file.stat()
    edges = _read(file, found.st_mtime_ns, found.st_size)
    left, right = np.zeros(len(special), np.int8), np.zeros(len(special), np.int8)
    for index, pair in edges.items():
        if index < len(special) and not special[index]:
            left[index], right[index] = pair
    return WordEdges(left, right)


@functools.lru_cache(maxsize=4)
def _read(file: Path, changed: int, size: int) -> dict[int, Edges]:
    """Edges by id. changed, size: of the file, in nanoseconds and bytes."""
    node = json.loads(file.read_text(encoding="utf-8"))
    model, edges_of = node["model"], _rule(node)
    if edges_of is None:
        raise ValueError(
            f"{file}: this {model['type']} tokenizer does not tell where words begin: it is no WordPiece, and marks "
            "blanks neither as byte-level BPE nor as Metaspace does: use a masking that needs no words"
        )
    if model["type"] == "Unigram":
        tokens = {index: token for index, (token, _) in enumerate(model["vocab"])}
    else:
        tokens = {index: token for token, index in model["vocab"].items()}
    # Added tokens are written as they stand in a text; some are in the vocabulary besides.
    added = {each["id"]: each["content"] for each in node.get("added_tokens", ())}
    edges = {index: edges_of(token) for index, token in tokens.items() if index not in added}
    return edges | {index: _edges(text.encode()) for index, text in added.items()}


def _rule(node: dict[str, Any]) -> Callable[[str], Edges] | None:
    """What gives the edges of a token of the vocabulary; None where nothing does."""
    model, parts = node["model"], list(_parts([node.get("normalizer"), node.get("pre_tokenizer")]))
    kinds = {part["type"] for part in parts}
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    if model["type"] == "WordLevel":
        return lambda token: (_APART, _ANY)
    if "ByteLevel" in kinds and model["type"] == "BPE":
        return _byte_level
    blanks = [part["replacement"] for part in parts if part["type"] == "Metaspace"]
    blanks += [part["content"] for part in parts if part["type"] == "Replace" and part["pattern"] == {"String": " "}]
    if blanks and blanks[0] != " ":
        return functools.partial(_metaspace, blanks[0], bool(model.get("byte_fallback")))
    if prefix:
        return lambda token: (_ANY if token.startswith(prefix) else _APART, _ANY)
    if suffix:
        return lambda token: (_ANY, _APART if token.endswith(suffix) else _ANY)
    return None


def _parts(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, list):
        for each in node:
            yield from _parts(each)
    elif isinstance(node, dict) and "type" in node:
        yield node
        yield from _parts([each for each in node.values() if isinstance(each, list)])


def _byte_level(token: str) -> Edges:
    # Some vocabularies have tokens besides that are no bytes spelled out.
    return _edges(bytes(_BYTES[char] for char in token) if _BYTES.keys() >= set(token) else token.encode())


def _metaspace(blank: str, byte_fallback: bool, token: str) -> Edges:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token) if byte_fallback else None
    return _edges(bytes([int(byte[1], 16)]) if byte else token.replace(blank, " ").encode())


def _edges(text: bytes) -> Edges:
    if not text:
        return _APART, _APART
    begin = next((at for at, byte in enumerate(text) if not _inside(byte)), len(text))
    last = max((at for at, byte in enumerate(text) if not _inside(byte)), default=0)
    left = _ANY if begin else _kind(text[: _length(text[0])])
    right = _LETTERS if begin == len(text) else _kind(text[last:])
    # An ideograph is a word: what goes on behind it is a byte of its own, which needs no kind.
    return (_APART if left == _IDEOGRAPH else left), (_ANY if right == _IDEOGRAPH else right)


_IDEOGRAPH = -1


def _inside(byte: int) -> bool:
    """Of UTF-8: whether the byte goes on with a character."""
    return 0x80 <= byte < 0xC0


def _length(lead: int) -> int:
    """Bytes of the character that a byte begins, in UTF-8."""
    return 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


def _kind(character: bytes) -> int:
    """Of one character, or of its first bytes."""
    try:
        char = character.decode()
    except UnicodeDecodeError:
        # By what its first byte leaves: E2 and EF are mostly punctuation, E3 to E9 ideographs, F0 and on pictures.
        lead = character[0]
        return _IDEOGRAPH if 0xE3 <= lead <= 0xE9 else _SIGNS if lead in (0xE2, 0xEF) or lead >= 0xF0 else _LETTERS
    if char.isspace():
        return _APART
    if _is_ideograph(ord(char)):
        return _IDEOGRAPH
    return _LETTERS if char.isalnum() or unicodedata.category(char).startswith("M") else _SIGNS


def _is_ideograph(code: int) -> bool:
    """In the blocks that BERT's tokenizer sets apart, and in the signs of Japanese."""
    return 0x3040 <= code < 0xA000 or 0xF900 <= code < 0xFB00 or 0x20000 <= code < 0x30000


def _byte_values() -> dict[str, int]:
    """The characters that stand for bytes in a byte-level vocabulary (GPT-2's bytes_to_unicode): those that can be seen
    for themselves, the others by the characters from 256 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_values()
