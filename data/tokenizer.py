"""The tokenizer of a dataset: trained here or taken from elsewhere, always saved as a folder that AutoTokenizer loads.

Raw text may hold the strings of special tokens (this file does: "[MASK]"). In `corpus_tokenizer`, which prepares the
training data, they are ordinary characters; in the saved tokenizer, which people use, they are the special tokens.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from data.added_tokens import add_tokens
from flexbert_core.durable import new_folder
from flexbert_core.schema import Component, ConfigError, Count, Registry, RunError, Schema, UserPath, named

TOKENIZERS = Registry("tokenizer", has_imports=False)

VOCAB_MULTIPLE = 64
"""The vocabulary is padded to a multiple of this: matrix kernels are fastest so (Karpathy, nanoGPT, 2023)."""

ROLES = ("unk", "cls", "sep", "pad", "mask")
_TRAINED_NAMES = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
# What other vocabularies call them, tried in this order.
_KNOWN_NAMES = {"unk": ["<unk>"], "cls": ["<s>"], "sep": ["</s>"], "pad": ["<pad>", "<|padding|>"], "mask": ["<mask>"]}


class TokenizerFacts(Schema):
    """What a stream's manifest says about its tokenizer."""

    fingerprint: str = Field(description="sha256 of tokenizer.json")
    vocab_size: int = Field(description="padded to a multiple of 64; every id is below it")
    cls_token_id: int
    sep_token_id: int
    pad_token_id: int
    mask_token_id: int
    unk_token_id: int | None = Field(description="null: the tokenizer refuses text that it does not know")
    special_ids: list[int] = Field(description="special tokens and ids that name no token, sorted")


@TOKENIZERS.register("train")
class TrainedTokenizer:
    """Byte-level BPE (Radford et al. 2019) trained on a sample of the training documents; any text round-trips."""

    class Config(Component):
        name: Literal["train"] = "train"
        vocab_size: Annotated[int, Field(ge=320, multiple_of=VOCAB_MULTIPLE)] = 8192
        """Special tokens included; less comes out when the text does not hold enough pairs."""
        sample_bytes: Count = 20_000_000
        """UTF-8 bytes of text to train on, from beginnings of many pieces of every stream, by its share."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def build(self, texts: Iterator[str]) -> tuple[Any, dict[str, str]]:
        """A `tokenizers.Tokenizer` and the special token of each role: [UNK] [CLS] [SEP] [PAD] [MASK], ids 0 to 4.

        A pure function of the texts.
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        specials = [AddedToken(name, special=True, lstrip=role == "mask") for role, name in _TRAINED_NAMES.items()]
        trainer = trainers.BpeTrainer(
            vocab_size=self.config.vocab_size,
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_without_long_words(texts), trainer)
        return tokenizer, _TRAINED_NAMES


# The trainer's time grows with the square of a word's length: 32 to 78 s for 320,000 characters without a blank, which
# are one word to it (encoded data, a sequence of genes).
_LONG_WORD = re.compile(r"\S{4096}|\s{4096}")


def _without_long_words(texts: Iterator[str]) -> Iterator[str]:
    """The texts, cut behind each 4096 characters that hold no blank, or nothing else."""
    for text in texts:
        edges = [0, *(match.end() for match in _LONG_WORD.finditer(text)), len(text)]
        yield from (text[first:last] for first, last in pairwise(edges) if last > first)


@TOKENIZERS.register("load")
class LoadedTokenizer:
    """A tokenizer.json, a folder that AutoTokenizer loads, or (only then the network is used) a name on the hub.

    Special tokens that it lacks are added behind its vocabulary, but for an unknown token: its model would never give
    it. Behind them come the tokens of `add`. Text that such a tokenizer does not know is an error. Truncation and
    padding are switched off; its normalizer and the rest stay as they are.
    """

    class Config(Component):
        name: Literal["load"] = "load"
        path: UserPath | None = None
        """tokenizer.json or a folder. Give this or `hub`."""
        hub: str | None = None
        """Name of a hub model whose tokenizer to take."""
        add: UserPath | None = None
        """A file of tokens to add, one on each line: terms of a domain, for a model that a run goes on from."""
        add_inside_words: bool = False
        """Whether they are found inside longer words, too, as signs and scripts without blanks need."""

        def model_post_init(self, context: Any) -> None:
            if (self.path is None) == (self.hub is None):
                raise ValueError("give either path (tokenizer.json or a folder) or hub (a name on the hub)")
            if self.add_inside_words and self.add is None:
                raise ValueError("add_inside_words: says nothing without `add`: give that, or leave it out")

    def __init__(self, config: Config) -> None:
        self.config = config

    def build(self, texts: Iterator[str]) -> tuple[Any, dict[str, str]]:
        """A `tokenizers.Tokenizer` and the special token of each role; the texts are not used.

        Raises ConfigError when there is no fast tokenizer there.
        """
        from tokenizers import Tokenizer, models
        from transformers import AutoTokenizer

        where = str(self.config.path or self.config.hub)
        names: dict[str, str | None] = {}
        path = Path(where)
        if self.config.path is not None and not path.exists():
            raise ConfigError(f"tokenizer.path: no such file or folder: {where!r} (for a name on the hub use `hub`)")
        try:
            if self.config.path is not None and path.is_file():
                tokenizer = Tokenizer.from_file(str(path))
            elif self.config.path is not None and not (path / "tokenizer_config.json").exists():
                tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
            else:
                loaded = AutoTokenizer.from_pretrained(str(path) if self.config.path is not None else where)
                if not loaded.is_fast:
                    raise ConfigError(f"tokenizer: {where!r} has no fast (tokenizer.json) form")
                tokenizer = loaded.backend_tokenizer
                names = {role: getattr(loaded, f"{role}_token") for role in ROLES}
        except ConfigError:
            raise
        except Exception as error:  # the loaders raise bare Exception among others
            raise ConfigError(f"tokenizer: cannot load {where!r}: {str(error).splitlines()[0]}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if isinstance(tokenizer.model, models.BPE):
            tokenizer.model.dropout = None  # whoever loads what is saved here would get random tokens, evaluations too
        unknown = _unknown_token(tokenizer, names.get("unk"))
        others = {role: names.get(role) or _find_or_add(tokenizer, role) for role in ROLES if role != "unk"}
        if self.config.add is not None:
            with named("tokenizer.add"):
                add_tokens(tokenizer, self.config.add, self.config.add_inside_words, unknown)
        return tokenizer, others if unknown is None else {"unk": unknown, **others}


def _unknown_token(tokenizer: Any, named: str | None) -> str | None:
    """What the tokenizer gives for text that it does not know; None: nothing. named: what its folder says.

    A model of all bytes needs none; it gets one all the same, for the strings of special tokens in a text.
    """
    node = json.loads(tokenizer.to_str())
    model = node["model"]
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    if model["unk_token"] in model["vocab"]:
        return model["unk_token"]
    if model["type"] != "BPE":
        return None
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if model["byte_fallback"] else None
    by_bytes = any('"ByteLevel"' in json.dumps(node[part]) for part in ("pre_tokenizer", "normalizer"))
    alphabet = fallback or (byte_alphabet() if by_bytes else None)
    if alphabet is None or not all(byte in model["vocab"] for byte in alphabet):
        return None
    return named or _find_or_add(tokenizer, "unk")


def byte_alphabet() -> list[str]:
    """The characters that stand for the 256 bytes in a byte-level vocabulary."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


def _find_or_add(tokenizer: Any, role: str) -> str:
    """The token of the vocabulary that serves as `role` by its name, else a new one behind the vocabulary."""
    from tokenizers import AddedToken

    own = _TRAINED_NAMES[role]
    for name in (own, *_KNOWN_NAMES[role]):
        if tokenizer.token_to_id(name) is not None:
            return name
    tokenizer.add_special_tokens([AddedToken(own, special=True, lstrip=role == "mask", normalized=False)])
    return own


def save_tokenizer(tokenizer: Any, names: dict[str, str], folder: Path) -> None:
    """Write the folder, whole or not at all. The post-processor then puts [CLS] before and [SEP] behind a text.

    names: the special token of each of ROLES, but for one that it does without.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    cls_id, sep_id = (tokenizer.token_to_id(names[role]) for role in ("cls", "sep"))
    ids = tokenizer.encode("").ids
    if ids[:1] != [cls_id] or ids[-1:] != [sep_id]:
        # Plain type ids for a pair: nobody here uses them, but a template must say something.
        tokenizer.post_processor = TemplateProcessing(
            single=f"{names['cls']} $A {names['sep']}",
            pair=f"{names['cls']} $A {names['sep']} $B:1 {names['sep']}:1",
            special_tokens=[(names["cls"], cls_id), (names["sep"], sep_id)],
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": name for role, name in names.items()},
    )
    with new_folder(folder) as partial:
        fast.save_pretrained(str(partial))


def corpus_tokenizer(folder: Path) -> Any:
    """The saved `tokenizers.Tokenizer`, set up for raw text: the strings of special tokens in it are ordinary text.

    Added tokens that are not special (runs of blanks, say) are still recognised. Raises RunError when unreadable.
    """
    from tokenizers import Tokenizer, models

    file = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise RunError(f"{file}: cannot be read: {error}") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None  # an older version may have saved it; shards follow from their texts
        if tokenizer.model.unk_token is None:
            # It would leave out what it does not know, without a word; with a name that it does not have it raises.
            tokenizer.model.unk_token = "\0no unknown token"
    return tokenizer


def cannot_encode(tokenizer: Any, text: str, error: BaseException) -> str:
    """Why a tokenizer raised on a text, in one line: what it does not know, if that is it."""
    if not re.search(r"(?i)\bunk\b|unk_id|unknown token", str(error)):
        return f"the tokenizer fails: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    unknown = next((word for word, _ in _words(tokenizer, text) if not _knows(tokenizer.model, word)), text)
    if len(unknown) > 40:
        unknown = next((char for char in unknown if not _knows(tokenizer.model, char)), unknown[:40])
    return (
        f"the tokenizer ({type(tokenizer.model).__name__}) has no unknown token, and does not know {unknown!r}: "
        "give it one, or choose another tokenizer"
    )


def _words(tokenizer: Any, text: str) -> list[tuple[str, Any]]:
    """What the tokenizer's model is given of a text."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    return [(text, None)] if tokenizer.pre_tokenizer is None else tokenizer.pre_tokenizer.pre_tokenize_str(text)


def _knows(model: Any, word: str) -> bool:
    try:
        model.tokenize(word)
    except Exception:  # tokenizers raises nothing narrower
        return False
    return True


def fingerprint(folder: Path) -> str:
    """sha256 of a saved tokenizer's tokenizer.json, in hex: what a stream's manifest calls tokenizer_fingerprint."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


_ROLE_FILES = ("special_tokens_map.json", "tokenizer_config.json")


def role_ids(folder: Path, tokenizer: Any) -> dict[str, int]:
    """The id of each of ROLES that a saved tokenizer has. tokenizer: its `corpus_tokenizer`."""
    # transformers 5 writes the roles into the one file only, 4 into both.
    file = next((file for name in _ROLE_FILES if (file := folder / name).is_file()), None)
    given = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
    tokens = {role: given.get(f"{role}_token") for role in ROLES}
    names = {role: token["content"] if isinstance(token, dict) else token for role, token in tokens.items() if token}
    ids = {role: tokenizer.token_to_id(name) for role, name in names.items()}
    return {role: index for role, index in ids.items() if index is not None}


def padded(rows: int) -> int:
    """Up to the next multiple of 64."""
    return -(-rows // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def tokenizer_facts(folder: Path, tokenizer: Any = None) -> TokenizerFacts:
    """Ids and fingerprint of a saved tokenizer. tokenizer: its `corpus_tokenizer`, where that is loaded already."""
    tokenizer = tokenizer or corpus_tokenizer(folder)
    named_ids = role_ids(folder, tokenizer)
    roles: dict[str, Any] = {f"{role}_token_id": named_ids.get(role) for role in ROLES}
    ids = set(tokenizer.get_vocab().values())
    vocab_size = padded(1 + max(ids))
    added = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    special: set[int] = added | (set(roles.values()) - {None}) | (set(range(vocab_size)) - ids)
    return TokenizerFacts(fingerprint=fingerprint(folder), vocab_size=vocab_size, special_ids=sorted(special), **roles)
