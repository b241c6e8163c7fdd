"""Where words begin: what a vocabulary tells is what the text says, token by token."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data.words import word_edges

TEXTS = [
    "The quick brown foxes aren't jumping (again) over lazy dogs; 'tis unbelievable, isn't it? 3.14 of 42nd",
    "def first_tokens(self):\n    return x+1  # caf\u00e9s, na\u00efve \u00fcberwords\n\tdone",
    "\u4f60\u597d\u4e16\u754c, hello \U0001f600\U0001f600! \u00bfQu\u00e9? \u041f\u0440\u0438\u0432\u0435\u0442 \u05e9\u05dc\u05d5\u05dd",
] * 20
SPECIALS = ["[UNK]", "[CLS]", "[SEP]"]
# The project's definition, written down independently: an ideograph, a run of letters and digits, or of other signs.
IDEOGRAPH = "[\u3040-\u9fff]"
WORD = re.compile(rf"{IDEOGRAPH}|(?:(?!{IDEOGRAPH})[^\W_])+|(?:(?!{IDEOGRAPH})(?:[^\w\s]|_))+")


def trained(
    model: Any, trainer: Any, pre_tokenizer: Any, normalizer: Any = None, added: str | None = None
) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer
    tokenizer.train_from_iterator(TEXTS, trainer)
    if added is not None:
        tokenizer.add_tokens([AddedToken(added, normalized=False)])
    return tokenizer


def byte_level(**options: Any) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet)
    return trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False, **options), added="    ")


def first_tokens(tokenizer: Tokenizer, folder: Path, ids: list[int]) -> list[int]:
    tokenizer.save(str(folder / "tokenizer.json"))
    special = np.zeros(tokenizer.get_vocab_size() + 3, bool)
    special[[tokenizer.token_to_id(name) for name in SPECIALS if tokenizer.token_to_id(name) is not None]] = True
    return word_edges(folder, special).first_tokens(np.array(ids, np.uint16), np.array([len(ids)])).tolist()


def by_text(encoding: Any, text: str) -> list[int]:
    """The first token of each token's word, by the places in the text that tokens stand for."""
    words = [match.span() for match in WORD.finditer(text)]
    found, names = list[int](), list[Any]()
    for number, (begin, end) in enumerate(encoding.offsets):
        while begin < end and text[begin].isspace():
            begin += 1
        name = next((word for word in words if word[0] <= begin < word[1]), ("blank", number))
        found.append(found[-1] if names and names[-1] == name else number)
        # A token of several words goes on with its last.
        names.append(next((word for word in words if word[0] < end <= word[1]), ("blank", number)))
    return found


@pytest.mark.parametrize("text", TEXTS[:3])
@pytest.mark.parametrize("options", [{}, {"use_regex": False}], ids=str)
def test_byte_level_words_are_those_of_the_text(text: str, options: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = byte_level(**options)
    encoding = tokenizer.encode(text)
    assert first_tokens(tokenizer, tmp_path, encoding.ids) == by_text(encoding, text)


def test_a_byte_level_vocabulary_may_have_tokens_that_are_no_bytes(tmp_path: Path) -> None:
    """Which no text is cut into; they are what they say."""
    vocab = {name: number for number, name in enumerate([*SPECIALS, "a", "\u0120b", "c d", "\u4f60"])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert first_tokens(tokenizer, tmp_path, [3, 3, 5, 3, 4, 6, 3]) == [0, 0, 0, 0, 4, 5, 6]


@pytest.mark.parametrize("text", TEXTS[:2])
def test_metaspace_words_are_those_of_the_text(text: str, tmp_path: Path) -> None:
    text = " ".join(text.split())
    for number, (model, trainer) in enumerate([
        (models.Unigram(), trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIALS, unk_token="[UNK]")),
        (models.BPE(unk_token="[UNK]"), trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIALS)),
    ]):  # fmt: skip
        tokenizer = trained(model, trainer, pre_tokenizers.Metaspace(prepend_scheme="never"))
        encoding = tokenizer.encode(text)
        folder = tmp_path / str(number)
        folder.mkdir()
        assert first_tokens(tokenizer, folder, encoding.ids) == by_text(encoding, text)


def test_bytes_that_metaspace_falls_back_to_are_of_their_character(tmp_path: Path) -> None:
    vocab = {name: number for number, name in enumerate([*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a"])}  # fmt: skip
    tokenizer = Tokenizer(models.BPE(vocab, [("\u2581", "a")], byte_fallback=True, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    encoding = tokenizer.encode("ab\u00e9b a\n\u4f60b")
    tokens = ["a", "b", "<0xC3>", "<0xA9>", "b", "\u2581a", "<0x0A>", "<0xE4>", "<0xBD>", "<0xA0>", "b"]
    assert encoding.tokens == tokens
    assert first_tokens(tokenizer, tmp_path, encoding.ids) == [0, 0, 0, 0, 0, 5, 6, 7, 7, 7, 7]


@pytest.mark.parametrize("text", TEXTS[:2])
def test_wordpiece_words_are_the_tokenizers_own(text: str, tmp_path: Path) -> None:
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIALS)
    tokenizer = trained(models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.BertPreTokenizer())
    encoding = tokenizer.encode(text)
    assert any(token.startswith("##") for token in encoding.tokens)
    firsts = dict[int, int]()
    expected = [firsts.setdefault(word, number) for number, word in enumerate(encoding.word_ids)]
    assert first_tokens(tokenizer, tmp_path, encoding.ids) == expected


def test_words_of_other_marks(tmp_path: Path) -> None:
    suffix = Tokenizer(models.BPE({"[UNK]": 0, "a": 1, "b</w>": 2, "c</w>": 3}, [], end_of_word_suffix="</w>"))
    assert first_tokens(suffix, tmp_path, [1, 1, 2, 1, 2, 3]) == [0, 0, 0, 3, 3, 5]
    level = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    assert first_tokens(level, tmp_path, [1, 2, 1]) == [0, 1, 2]


def test_a_row_and_a_special_token_begin_a_word(tmp_path: Path) -> None:
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=SPECIALS)
    tokenizer = trained(models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.BertPreTokenizer())
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    special = np.arange(tokenizer.get_vocab_size()) < 3
    piece = next(index for token, index in tokenizer.get_vocab().items() if token.startswith("##"))
    edges = word_edges(tmp_path, special)
    ids = np.array([1, piece, piece, 0, piece, 2, piece, piece], np.uint32)
    # The second row begins with its seventh token, an empty one after it.
    assert edges.first_tokens(ids, np.array([7, 7, 8])).tolist() == [0, 1, 1, 3, 4, 5, 6, 7]
    assert edges.first_tokens(ids[:0], np.array([], np.int64)).tolist() == []
    assert edges.first_tokens(ids[:1], np.array([1])).tolist() == [0]


@pytest.mark.parametrize("pre_tokenizer", [pre_tokenizers.Whitespace(), None])
def test_a_vocabulary_that_does_not_tell_is_refused(pre_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"[UNK]": 0, "a": 1}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.BPEDecoder()
    with pytest.raises(
        ValueError, match=r"tokenizer.json: this BPE tokenizer does not tell where words begin"
    ) as error:
        first_tokens(tokenizer, tmp_path, [1])
    assert "\n" not in str(error.value)
