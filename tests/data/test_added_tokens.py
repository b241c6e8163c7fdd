"""Tokens that prepare adds behind a tokenizer's vocabulary: found in text, brought back from it, and told or refused."""

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from data.added_tokens import read_tokens
from data.tokenizer import corpus_tokenizer
from flexbert_core.schema import ConfigError
from tests.helpers.continuing import bytes_tokenizer, extended
from tests.helpers.preparing import config_file, run, write_jsonl
from tests.helpers.texts import text_tokenizer


def added(folder: Path, text: str, kind: str = "words", **options: Any) -> Any:
    """A tokenizer of words or bytes with the tokens of a file, as transformers loads it."""
    source = folder / kind
    text_tokenizer().save_pretrained(source) if kind == "words" else bytes_tokenizer(source)
    file = folder / "terms.txt"
    file.write_text(text, encoding="utf-8", newline="")
    return AutoTokenizer.from_pretrained(extended(source, folder / "extended", file, **options))


def test_whole_words_are_found_and_come_back(tmp_path: Path) -> None:
    tokenizer = added(tmp_path, "catfish\nc++\nsea otter\n☃\nmat-x\n")
    before = AutoTokenizer.from_pretrained(tmp_path / "words")
    assert tokenizer.convert_ids_to_tokens(range(len(before), len(tokenizer))) == [
        "catfish",
        "c++",
        "sea otter",
        "☃",
        "mat-x",
    ]
    text = "the catfish sat on c++ , sea otter ☃ and mat-x."
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found = ["the", "catfish", "sat", "on", "c++", ",", "sea otter", "☃", "and", "mat-x", "."]
    assert tokenizer.convert_ids_to_tokens(ids) == found
    assert tokenizer.decode(ids) == "the catfish sat on c++, sea otter ☃ and mat-x."
    assert tokenizer.tokenize("Catfish")[0] == "catfish"  # as the normalizer leaves it
    assert "catfish" not in tokenizer.tokenize("catfishes")
    assert (
        corpus_tokenizer(tmp_path / "extended").encode(text, add_special_tokens=False).ids == ids
    )  # as prepare has it
    unaffected = "The cats sleep on catfishes."
    assert tokenizer(unaffected).input_ids == before(unaffected).input_ids


def test_inside_words_where_asked(tmp_path: Path) -> None:
    tokens = added(tmp_path, "fish\n", add_inside_words=True).tokenize("catfishes")
    assert tokens[:2] == ["cat", "fish"]


def test_a_blank_in_front_is_part_of_a_byte_level_token(tmp_path: Path) -> None:
    text = "a kinase, kinases and café au lait, kinase "
    with_blank, without = (added(tmp_path / str(number), terms, "bytes") for number, terms in enumerate((" kinase\ncafé au lait\n", "kinase\n")))  # fmt: skip
    for tokenizer in (with_blank, without):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
    tokens = with_blank.tokenize(text)
    assert tokens.count(" kinase") == 3
    assert "café au lait" in tokens
    tokens = without.tokenize(text)
    assert [tokens[number - 1] for number, token in enumerate(tokens) if token == "kinase"] == ["Ġ", "Ġ"]


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    tokenizer = added(tmp_path, "cat\r\n\r\ncatfish\r\n  \r\ncatfish\r\n##ing\r\nthe\r\n")
    assert len(tokenizer) == len(text_tokenizer()) + 1
    file = tmp_path / "terms.txt"
    assert caplog.messages == [
        f"{file}: left out: 2 empty lines; what stands there twice: 'catfish'",
        f"{file}: left out: 3 that are tokens already: 'cat', '##ing', 'the'",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("catfish\nMRNA\n", "line 2: 'MRNA': the tokenizer's normalizer makes 'mrna' of it: write it so"),
        (" catfish\n", "line 1: ' catfish': blanks around it: remove them"),
        ("catfish \nDog-x\n", "line 1: 'catfish ': blanks around it: remove them (and 1 lines more)"),
        ("cat\tfish\n", "line 1: 'cat\\tfish': holds a character that cannot be printed, such as a tab: remove it"),
        ("cat\ndog\n", "all its 2 tokens are tokens already: leave `add` out"),
        ("\n\n", "names no token: write one on each line"),
    ],
)
def test_what_could_never_be_found_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        added(tmp_path, text)
    assert str(error.value) == f"tokenizer.add: {tmp_path / 'terms.txt'}: {line}"


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "terms.txt"
    for name, line in ((str(file), "cannot be read: No such file or directory"), ("s3://bucket/terms.txt", "a file on this machine is wanted")):  # fmt: skip
        with pytest.raises(ConfigError, match=line):
            read_tokens(name)
    file.write_bytes(b"caf\xe9\n")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        read_tokens(str(file))


def test_prepare_uses_them_and_notices_an_edit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text_tokenizer().save_pretrained(tmp_path / "source")
    for name in ("a", "b"):
        write_jsonl(
            tmp_path / name / "texts.jsonl", [f"the catfish sat on {name} {'dog ' * number}" for number in range(40)]
        )
    terms = tmp_path / "terms.txt"
    terms.write_text("catfish\n")
    file = config_file(tmp_path, tokenizer={"name": "load", "path": str(tmp_path / "source"), "add": str(terms)})
    output = run(file)
    assert corpus_tokenizer(output / "tokenizer").token_to_id("catfish") == len(text_tokenizer())
    run(file)
    terms.write_text("catfish\ndogfish\n")
    with pytest.raises(ConfigError, match=r"tokenizer\.add: .*terms\.txt has changed: .* holds the old ones, whole"):
        run(file)
    with pytest.raises(ConfigError, match="tokenizer: add_inside_words: says nothing without `add`"):
        run(config_file(tmp_path, tokenizer={"name": "load", "path": "x", "add_inside_words": True}))
