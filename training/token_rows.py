"""From the rows of a model's token table to those of a run whose tokenizer has other tokens (the run file's `tokens`).

A row of a token that both tokenizers have is copied. A new token starts as the mean of the rows of its pieces, as in
IndoBERTweet (Koto et al. 2021, arXiv 2109.04607, sec. 3.2). The decoder and its bias are made alike, so that its logit
is the mean of its pieces'.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ranks
from data.added_tokens import is_one, named_tokens, read_tokens
from data.feed.loader import tokenizer_folder
from data.keyed import torch_seed
from data.tokenizer import byte_alphabet, corpus_tokenizer, padded, role_ids
from flexbert_core.schema import ConfigError, named
from recipe.config import RunConfig

log = logging.getLogger(__name__)
_SPARE = 20.0  # under the lowest decoder bias: e^-20 of the softmax, and no cliff where label smoothing looks at it
_TABLES, _BIAS = ("encoder.embedding.tokens.weight", "head.output.weight"), "head.decoder_bias"


@dataclass(frozen=True)
class TokenRows:
    """sources: for each row of the run's table the rows of the model's table that it is made of: one is copied, several
    are pieces, an empty list is a token of which no piece is known; None: the id names no token. new: tokens by id."""

    sources: list[Sequence[int] | None]
    new: dict[int, str]

    @property
    def without_pieces(self) -> list[str]:
        return [token for index, token in self.new.items() if not self.sources[index]]


def plan_rows(config: RunConfig, folder: Path, old: int) -> TokenRows:
    """What each row of the run's table comes from. folder: of the model that `from` names. old: rows of its table.

    Raises ConfigError, starting with the key, for tokenizers that do not fit each other, and for fewer rows than there
    are.
    """
    rows, tokens = config.model.vocab_size, config.tokens
    ours = tokenizer_folder(config.data)
    if not (ours / "tokenizer.json").is_file():
        raise ConfigError(f"data.tokenizer: {ours}: holds no tokenizer.json")
    here = corpus_tokenizer(ours)
    vocabulary = dict(sorted(here.get_vocab(with_added_tokens=True).items(), key=lambda pair: pair[1]))
    if tokens.add is not None:
        unk = role_ids(ours, here).get("unk")
        _check_added(tokens.add, here, None if unk is None else here.id_to_token(unk), str(config.data.tokenizer))
    if rows < old and not tokens.other_tokenizer:
        fix = padded(max(old, 1 + max(vocabulary.values())))
        raise ConfigError(
            f"model.vocab_size: is {rows}, the model that `from` names has {old} rows: set model.vocab_size={fix}"
        )
    kept: list[Sequence[int] | None] = [[row] if row < old else None for row in range(rows)]
    if not (folder / "tokenizer.json").is_file():
        if tokens.add is not None or tokens.other_tokenizer:
            raise ConfigError(
                f"tokens: {folder} holds no tokenizer.json, so what is new cannot be told: save its tokenizer there, "
                "in its fast form"
            )
        log.warning("from: %s: holds no tokenizer.json: whether its tokens are the streams' cannot be checked", folder)
        new = {index: token for token, index in vocabulary.items() if old <= index < rows}
        return TokenRows([[] if row in new else source for row, source in enumerate(kept)], new)
    there = corpus_tokenizer(folder)
    if tokens.other_tokenizer:
        if there.get_vocab(with_added_tokens=True).items() <= vocabulary.items():
            raise ConfigError(
                f"tokens.other_tokenizer: {ours} has all tokens of {folder} under their ids: it is no other one, leave "
                "the key out"
            )
        shared = _shared(here, there, role_ids(ours, here), role_ids(folder, there))
        kept = [None] * rows
    else:
        _check_same(vocabulary, there.get_vocab(with_added_tokens=True), ours, folder)
        shared = {index: index for token, index in vocabulary.items() if there.token_to_id(token) == index}
    shared = {index: row for index, row in shared.items() if row < old}
    new = {index: token for token, index in vocabulary.items() if index not in shared and index < rows}
    for index, row in shared.items():
        if index < rows:
            kept[index] = [row]
    unknown = role_ids(folder, there).get("unk")
    read, theirs_of_bytes = Surface(here), Surface(there).of_bytes
    for index, token in new.items():
        text, begins = read(token)
        pieces = _pieces(there, f" {text}" if begins and theirs_of_bytes else text)
        kept[index] = [piece for piece in pieces if piece < old and piece != unknown]
    return TokenRows(kept, new)


def with_rows(weights: Mapping[str, Tensor], plan: TokenRows, init: str, seed: int) -> dict[str, Tensor]:
    """Weights under our names with the plan's rows in the token table, the decoder and its bias.

    An id that names no token starts as the mean of all rows, with a bias 20 under the lowest: what is never a target
    keeps out of the softmax. init: of `tokens`; a token without pieces starts as the mean of all, too.
    """
    made = dict(weights)
    for number, name in enumerate((*_TABLES, _BIAS)):
        if name in weights:
            made[name] = _rows(weights[name], plan, init, seed, number)
    return made


def _rows(old: Tensor, plan: TokenRows, init: str, seed: int, number: int) -> Tensor:
    """old: (rows, width), or a bias (rows,). number: of the tensor, for draws."""
    if plan.sources == [[row] for row in range(len(old))]:
        return old
    made = old[torch.tensor([source[0] if source else 0 for source in plan.sources])]
    mean = old.mean(0)
    for index, source in enumerate(plan.sources):
        if source is None:
            made[index] = mean if old.ndim == 2 else old.min() - _SPARE
    for index in plan.new:
        source = plan.sources[index]
        if init == "mean-of-pieces" and source:
            made[index] = old[list(source)].mean(0)
        elif init == "normal" and old.ndim == 2:
            generator = torch.Generator().manual_seed(torch_seed(seed, "token row", number, index))
            made[index] = mean + old.std(0) * torch.randn(old.shape[1], generator=generator)
        else:
            made[index] = mean
    return made


def tell(plan: TokenRows, init: str) -> dict[str, Any]:
    """What origin.json says of the rows. Says aloud which new tokens have no pieces, where these would be used."""
    without = plan.without_pieces if init == "mean-of-pieces" else []
    if without and ranks.rank() == 0:
        log.warning(
            "tokens: of %d new tokens the model's tokenizer knows no piece, so they start as the mean of all: %s",
            len(without),
            named_tokens(without),
        )
    copied = sum(source is not None for source in plan.sources) - len(plan.new)
    return {"new": len(plan.new), "init": init, "copied": copied, "first": list(plan.new.values())[:3]}


class Surface:
    """What a token of a tokenizer stands for: its text, and whether it begins a word; None: it stands for itself
    anywhere, as added tokens do. So tokens of WordPiece, byte-level and SentencePiece vocabularies can be compared."""

    def __init__(self, tokenizer: Any) -> None:
        node = json.loads(tokenizer.to_str())
        parts = json.dumps([node["pre_tokenizer"], node["decoder"]])
        self._added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        self._prefix = node["model"].get("continuing_subword_prefix") or None
        self.of_bytes = '"ByteLevel"' in parts
        self._blank = "▁" if '"Metaspace"' in parts else None

    def __call__(self, token: str) -> tuple[str, bool | None]:
        if token in self._added:
            return token, None
        if self.of_bytes and all(char in _BYTES for char in token):
            text = bytes(_BYTES[char] for char in token).decode("utf-8", "surrogateescape")
            return text.removeprefix(" "), text.startswith(" ")
        if self._blank is not None:
            return token.removeprefix(self._blank), token.startswith(self._blank)
        if self._prefix is not None and token.startswith(self._prefix):
            text = token.removeprefix(self._prefix)
            return text, None if _is_sign(text) else False  # signs are words of their own there, also inside of others
        return token, True


def _is_sign(text: str) -> bool:
    return not any(char.isalnum() for char in text)


def _byte_values() -> dict[str, int]:
    """The bytes that the characters of a byte-level vocabulary stand for: printable ones for themselves, the others, in
    order, for those from U+0100 on (Radford et al. 2019, the encoder of GPT-2)."""
    alphabet = set(byte_alphabet())
    own = {chr(byte): byte for byte in range(256) if chr(byte) in alphabet}
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    return own | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_values()


def _shared(here: Any, there: Any, roles: Mapping[str, int], their_roles: Mapping[str, int]) -> dict[int, int]:
    """The row of each token that is also one of the other tokenizer's. Special tokens are the same by what they are
    for."""
    found: dict[tuple[str, bool | None], int] = {}
    read, read_theirs = Surface(here), Surface(there)
    for token, row in sorted(there.get_vocab(with_added_tokens=True).items(), key=lambda pair: pair[1]):
        found.setdefault(read_theirs(token), row)
    shared = dict[int, int]()
    for token, index in here.get_vocab(with_added_tokens=True).items():
        text, begins = read(token)
        for surface in [(text, begins), *([(text, not begins)] if _is_sign(text) else [])]:
            if surface in found:
                shared.setdefault(index, found[surface])
    return shared | {index: their_roles[role] for role, index in roles.items() if role in their_roles}


def _pieces(there: Any, text: str) -> list[int]:
    """Rows of what the model's tokenizer splits a text into; none where it cannot."""
    try:
        return there.encode(text, add_special_tokens=False).ids
    except Exception:  # parts of a character, or what is not known and has no token; tokenizers raises nothing narrower
        return []


def _check_same(here: Mapping[str, int], there: Mapping[str, int], ours: Path, folder: Path) -> None:
    if different := there.items() - here.items():  # ours may have more
        token = min(different, key=lambda pair: (pair[1], pair[0]))[0]
        raise ConfigError(
            f"data.tokenizer: {ours}: is not the tokenizer of {folder}: {token!r} is {here.get(token)} here, "
            f"{there.get(token)} there: prepare the streams with that one, or say tokens.other_tokenizer=true"
        )


def _check_added(file: str, here: Any, unknown: str | None, where: str) -> None:
    with named("tokens.add"):
        for token, number in read_tokens(file).items():
            if here.token_to_id(token) is None and not is_one(here, token, unknown):
                raise ConfigError(
                    f"{file}: line {number}: {token!r} is no token of data.tokenizer {where}: prepare the streams with "
                    f"`tokenizer: {{name: load, ..., add: {file}}}`"
                )
