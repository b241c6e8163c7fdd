"""Tokens of the user's own behind a tokenizer's vocabulary, from a file with one on each line."""

import logging
from pathlib import Path
from typing import Any

from data.store.transfer import is_url
from flexbert_core.schema import ConfigError

log = logging.getLogger(__name__)
_NAMED = 3  # tokens that a message names


def read_tokens(file: str) -> dict[str, int]:
    """The tokens of a UTF-8 file, each with the number of its first line, from 1. Empty lines and what comes twice are
    left out, and said. Raises ConfigError, starting with the file, when there is none, or when it cannot be read."""
    if is_url(file):
        raise ConfigError(f"{file}: a file on this machine is wanted, not a URL: fetch it first")
    try:
        lines = Path(file).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 ({error.reason} at byte {error.start}): save it so") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    tokens: dict[str, int] = {}
    empty, twice = 0, dict[str, None]()
    for number, token in enumerate((line.removesuffix("\r") for line in lines), 1):
        if not token.strip():
            empty += 1
        elif token in tokens:
            twice[token] = None
        else:
            tokens[token] = number
    if not tokens:
        raise ConfigError(f"{file}: names no token: write one on each line")
    said = [f"{empty} empty lines"] if empty else []
    said += [f"what stands there twice: {named_tokens(twice)}"] if twice else []
    if said:
        log.warning("%s: left out: %s", file, "; ".join(said))
    return tokens


def add_tokens(tokenizer: Any, file: str, inside_words: bool, unknown: str | None) -> list[str]:
    """Add the tokens of a file behind the vocabulary of a `tokenizers.Tokenizer`, in place, in their order; gives those
    that are new. What is one token already is left out, and said. unknown: the token of what is not known, if any.

    They are found in text as the normalizer leaves it, before it is split into words: as whole words, or with
    inside_words anywhere. One that begins with a blank, where the tokenizer's bytes keep it, is found at the beginning
    of words.
    Raises ConfigError, starting with the file, for a token that the tokenizer could never find: the normalizer changes
    it, or a blank or what cannot be printed is in the wrong place; and when none is new.
    """
    from tokenizers import AddedToken

    tokens, faults = read_tokens(file), list[str]()
    known, new = list[str](), list[str]()
    for token, number in tokens.items():
        if (fault := _fault(tokenizer, token)) is not None:
            faults.append(f"line {number}: {token!r}: {fault}")
        elif tokenizer.token_to_id(token) is not None or is_one(tokenizer, token, unknown):
            known.append(token)
        else:
            new.append(token)
    if faults:
        more = f" (and {len(faults) - 1} lines more)" if faults[1:] else ""
        raise ConfigError(f"{file}: {faults[0]}{more}")
    if not new:
        raise ConfigError(f"{file}: all its {len(tokens)} tokens are tokens already: leave `add` out")
    if known:
        log.warning("%s: left out: %d that are tokens already: %s", file, len(known), named_tokens(known))
    whole = [not inside_words and not token.startswith(" ") for token in new]
    pairs = zip(new, whole, strict=True)
    tokenizer.add_tokens([AddedToken(token, single_word=single, normalized=True) for token, single in pairs])
    return new


def _fault(tokenizer: Any, token: str) -> str | None:
    """Why it could not be found in any text, or not be told apart from a slip; None: it can."""
    if token != token.rstrip() or (token != token.lstrip() and not (_keeps_blanks(tokenizer) and _one_blank(token))):
        return "blanks around it: remove them"
    if not token.isprintable():
        return "holds a character that cannot be printed, such as a tab: remove it"
    normalizer = tokenizer.normalizer
    found = token if normalizer is None else normalizer.normalize_str(token)
    return None if found == token else f"the tokenizer's normalizer makes {found!r} of it: write it so"


def _one_blank(token: str) -> bool:
    return token[0] == " " and token[1:] == token[1:].lstrip()


def _keeps_blanks(tokenizer: Any) -> bool:
    """Whether a blank before a word is part of its token, as in byte-level vocabularies."""
    return "ByteLevel" in str(tokenizer.pre_tokenizer)


def is_one(tokenizer: Any, token: str, unknown: str | None) -> bool:
    """Whether text of it alone is one token that says what it is."""
    try:
        found = tokenizer.encode(token, add_special_tokens=False).tokens
    except Exception:  # without an unknown token; tokenizers raises nothing narrower
        return False
    return len(found) == 1 and found[0] != unknown


def named_tokens(tokens: Any) -> str:
    """The first of them, for a message."""
    shown = [repr(token) for token in list(tokens)[:_NAMED]]
    return ", ".join([*shown, "..."] if len(tokens) > _NAMED else shown)
