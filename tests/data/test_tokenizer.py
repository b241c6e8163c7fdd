"""Fixed ids, exact round trips, and special strings that stay plain text in the training data."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from data.tokenizer import TOKENIZERS, TrainedTokenizer, corpus_tokenizer, save_tokenizer, tokenizer_facts
from flexbert_core.schema import ConfigError

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "def f(x):\n    return x + 1\n",
    "\u00e9t\u00e9 \u4f60\u597d",
] * 20
SPECIALS = ["[MASK]", "[CLS]", "[SEP]", "[PAD]", "[UNK]"]


def make(folder: Path, node: dict[str, Any]) -> Path:
    tokenizer, names = TOKENIZERS.build(TOKENIZERS.parse(node)).build(iter(TEXTS))
    save_tokenizer(tokenizer, names, folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tokenizer") / "tokenizer", {"name": "train", "vocab_size": 384})


def test_trained_ids_and_facts(trained: Path) -> None:
    facts = tokenizer_facts(trained)
    assert (facts.unk_token_id, facts.cls_token_id, facts.sep_token_id, facts.pad_token_id, facts.mask_token_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    real = Tokenizer.from_file(str(trained / "tokenizer.json")).get_vocab_size()
    assert facts.vocab_size % 64 == 0
    assert real <= facts.vocab_size < real + 64
    assert facts.special_ids == [0, 1, 2, 3, 4, *range(real, facts.vocab_size)]


def test_roles_are_known_without_the_file_that_transformers_5_leaves_out(trained: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (alone / name).write_bytes((trained / name).read_bytes())
    assert tokenizer_facts(alone) == tokenizer_facts(trained)


def test_training_is_deterministic(trained: Path, tmp_path: Path) -> None:
    again = make(tmp_path / "again", {"name": "train", "vocab_size": 384})
    for file in trained.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()


def test_auto_tokenizer(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(trained))
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    encoded = tokenizer("The quick fox", "pair")
    assert set(encoded) == {"input_ids", "attention_mask"}
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert (tokens[0], tokens[-1], tokens.count("[SEP]")) == ("[CLS]", "[SEP]", 2)
    # lstrip: the mask takes the blank before it, so that what is predicted in its place is " fox" and not "fox".
    with_mask = tokenizer.convert_ids_to_tokens(tokenizer("The quick [MASK] jumps").input_ids)
    mask = with_mask.index("[MASK]")
    assert "".join(with_mask[1:mask]) == "The\u0120quick"
    assert with_mask[mask + 1].startswith("\u0120")
    assert (tokenizer.cls_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id) == (1, 4, 3)


unicode_text = st.lists(st.one_of(st.text(), st.sampled_from([*SPECIALS, " ", "\n", "  [MASK]"]))).map("".join)


@given(text=unicode_text)
def test_corpus_round_trip_on_arbitrary_unicode(trained: Path, text: str) -> None:
    tokenizer = corpus_tokenizer(trained)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert not set(ids) & set(tokenizer_facts(trained).special_ids)
    assert tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids == ids


@given(text=unicode_text.filter(lambda text: "[" not in text))
def test_saved_tokenizer_adds_cls_and_sep(trained: Path, text: str) -> None:
    raw = corpus_tokenizer(trained).encode(text, add_special_tokens=False).ids
    assert Tokenizer.from_file(str(trained / "tokenizer.json")).encode(text).ids == [1, *raw, 2]


def word_level(path: Path, **words: int) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2, **words}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken("  ", normalized=False)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(path))


def test_load_adds_what_is_missing_and_keeps_the_rest(tmp_path: Path) -> None:
    word_level(tmp_path / "in.json")
    folder = make(tmp_path / "out", {"name": "load", "path": str(tmp_path / "in.json")})
    facts = tokenizer_facts(folder)
    # 3 words and one added token; <unk> serves as it is; [CLS] [SEP] [PAD] [MASK] come behind
    assert (facts.unk_token_id, facts.cls_token_id, facts.sep_token_id, facts.pad_token_id, facts.mask_token_id) == (
        0,
        4,
        5,
        6,
        7,
    )
    assert facts.special_ids == [0, *range(4, 64)]
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    assert tokenizer("hello world " * 4).input_ids == [4, *[1, 2] * 4, 5]  # neither cut to 4 nor padded to 16
    assert json.loads((folder / "tokenizer.json").read_text())["normalizer"] == {"type": "NFC"}
    assert tokenizer.unk_token == "<unk>"


def test_saved_folder_loads_back_to_the_same_ids(trained: Path, tmp_path: Path) -> None:
    again = make(tmp_path / "again", {"name": "load", "path": str(trained)})
    before, after = (tokenizer_facts(folder) for folder in (trained, again))
    assert before.model_dump(exclude={"fingerprint"}) == after.model_dump(exclude={"fingerprint"})
    text = "The quick [MASK] jumps"
    assert AutoTokenizer.from_pretrained(str(again))(text) == AutoTokenizer.from_pretrained(str(trained))(text)


@pytest.mark.parametrize("unknown", [None, "[UNK]"])
def test_nothing_is_encoded_with_dropout(tmp_path: Path, unknown: str | None) -> None:
    vocab = {"[UNK]": 0, "a": 1, "b": 2, "ab": 3, "abab": 4}
    model = models.BPE(vocab, [("a", "b"), ("ab", "ab")], dropout=0.9, unk_token=unknown)
    Tokenizer(model).save(str(tmp_path / "in.json"))
    folder = make(tmp_path / "out", {"name": "load", "path": str(tmp_path / "in.json")})
    assert AutoTokenizer.from_pretrained(str(folder)).encode("abab" * 50, add_special_tokens=False) == [4] * 50
    shutil.copy(tmp_path / "in.json", folder / "tokenizer.json")  # as an older version saved it
    assert corpus_tokenizer(folder).encode("abab" * 50, add_special_tokens=False).ids == [4] * 50


def test_load_errors(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{}")
    for path, message in [
        ("none", "tokenizer.path: no such file or folder: .*none"),
        ("broken.json", "tokenizer: cannot load"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make(tmp_path / "out", {"name": "load", "path": str(tmp_path / path)})
    with pytest.raises(ValueError, match="give either path"):
        TOKENIZERS.parse({"name": "load"})
    with pytest.raises(ValueError, match="multiple of 64"):
        TOKENIZERS.parse({"name": "train", "vocab_size": 1000})


@pytest.mark.parametrize("text", ["a" * 2**20, "ab12" * 2**18, "\n" * 2**20], ids=["letters", "mixed", "blanks"])
def test_a_text_without_blanks_does_not_stop_training(text: str) -> None:
    """tokenizers' trainer needs minutes for one word of 320,000 characters, and the square of that for more."""
    start = time.process_time()
    tokenizer, _ = TrainedTokenizer(TrainedTokenizer.Config(vocab_size=320)).build(iter([text, "plain words"]))
    assert time.process_time() - start < 60
    assert tokenizer.decode(tokenizer.encode(text[:5000]).ids) == text[:5000]
