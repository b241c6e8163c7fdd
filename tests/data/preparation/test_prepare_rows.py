"""One rule for odd rows in every source, texts that the tokenizer does not know, and sources that changed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from benchmarks.fuzz_prepare import fuzz
from data.inspect import inspect
from data.preparation.documents import TaskDocuments
from data.preparation.sources import SOURCES, LineError
from data.store.manifest import MANIFEST
from data.store.shards import open_stream
from flexbert_core.schema import ConfigError
from tests.helpers.preparing import (
    documents,
    error_of,
    jsonl_source,
    manifest_of,
    prepare_one,
    read_texts,
    shown,
    write_jsonl,
)

GOOD = documents(20)


def write_lines(path: Path, *lines: bytes) -> None:
    write_jsonl(path, GOOD)
    path.write_bytes(path.read_bytes() + b"\n".join(lines))


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"text": "half an emoji \\ud83d"}', "half an emoji \ufffd"),
        (b'{"text": "\\udca9\\ud83d\\ude00"}', "\ufffd\U0001f600"),
        (b'{"text": "as bytes \xed\xa0\xbd"}', "as bytes \ufffd"),
        (b'{"text": "fine", "score": NaN}', "fine"),
        (b'{"score": [-Infinity, Infinity], "text": "fine"}', "fine"),
        (b'{"text": "first", "text": "last"}', "last"),
        (b'\xef\xbb\xbf{"text": "mark"}\r', "mark"),
        (b'{"text": "large", "id": 123456789012345678901234567890}', "large"),
    ],
)
def test_rows_that_are_read(tmp_path: Path, line: bytes, text: str) -> None:
    write_lines(tmp_path / "x.jsonl", line)
    assert read_texts(prepare_one(tmp_path, jsonl_source(tmp_path / "x.jsonl"))) == [*GOOD, text]


def test_null_is_an_empty_document_in_every_source(tmp_path: Path) -> None:
    import datasets

    write_lines(tmp_path / "x.jsonl", b'{"text": null}')
    table = pa.table({"text": [*GOOD, None]})
    pq.write_table(table, tmp_path / "x.parquet")
    datasets.Dataset(table).save_to_disk(str(tmp_path / "hf"))
    sources = [jsonl_source(tmp_path / "x.jsonl"), {"name": "parquet", "paths": [str(tmp_path / "x.parquet")]}]
    for number, source in enumerate([*sources, {"name": "datasets", "path": str(tmp_path / "hf")}]):
        train = prepare_one(tmp_path, source, output=str(tmp_path / f"out{number}"))
        assert read_texts(train) == GOOD
        assert (manifest_of(train).empty_documents, manifest_of(train).read["documents"]) == (1, 21)  # pyright: ignore


ODD = {
    b'{"text": [1]}': ("text is a list", "column 'text' holds a list, expected a string"),
    b'{"text": 3}': ("text is a number", "column 'text' holds a number, expected a string"),
    b'{"text": {"a": 1}}': ("text is an object", "column 'text' holds an object, expected a string"),
    b'{"text": true}': ("text is a boolean", "column 'text' holds a boolean, expected a string"),
    b'{"txt": "x"}': ("no column 'text'", "no column 'text', did you mean 'txt'? (source key text_column)"),
    b'{"text": "caf\xe9"}': ("not UTF-8", "not UTF-8 text (invalid continuation byte at byte 13): convert it first"),
    b'{"text": "cut': ("not valid JSON", "not valid JSON: unexpected end of data"),
    b"[": ("not valid JSON", "not valid JSON: unexpected end of data"),
    b'["a"]': ("row is a list", "expected a JSON object, got a list, one a line (to convert: jq -c '.[]' FILE)"),
    b"\0\0\0": ("not valid JSON", "not valid JSON: unexpected character"),
    b"[" * 100_000: ("not valid JSON", "not valid JSON: "),
}


@pytest.mark.parametrize("line", ODD)
def test_odd_rows_end_prepare_or_are_counted(tmp_path: Path, line: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    reason, message = ODD[line]
    write_lines(tmp_path / "x.jsonl", line, line, b'{"text": "after"}')
    said = error_of(tmp_path, jsonl_source(tmp_path / "x.jsonl"))
    assert said.startswith(f"{tmp_path}/x.jsonl:21: {message}")
    shutil.rmtree(tmp_path / "out")
    train = prepare_one(tmp_path, jsonl_source(tmp_path / "x.jsonl"), on_error="skip")
    assert read_texts(train) == [*GOOD, "after"]
    assert manifest_of(train).read == {"files": 1, "documents": 21}
    assert manifest_of(train).skipped == {"files": {}, "documents": {reason: 2}}
    assert f"skipped: 2 {reason} (the first: {said})" in capsys.readouterr().err


def test_the_first_skipped_line_is_counted_at_the_end_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its number costs reading the file up to there, which each task did for its own first."""
    monkeypatch.setattr("data.preparation.sources.base.RANGE_BYTES", 1000)
    write_lines(tmp_path / "x.jsonl", b"{", b'{"text": "after"}', b"{")
    train = prepare_one(tmp_path, jsonl_source(tmp_path / "x.jsonl"), on_error="skip")
    assert f"skipped: 2 not valid JSON (the first: {tmp_path}/x.jsonl:21: not valid" in capsys.readouterr().err
    assert read_texts(train) == [*GOOD, "after"]
    source = SOURCES.build(SOURCES.parse(jsonl_source(tmp_path / "x.jsonl")))
    units = source.find().units
    assert len(units) > 5
    task = {"source": jsonl_source(tmp_path / "x.jsonl"), "on_error": "skip", "columns": [], "units": units}
    found = TaskDocuments(task)
    assert len(list(found)) == 21
    count, (path, start, index, message) = found.skipped["not valid JSON"]
    assert (count, path, message[:14]) == (2, f"{tmp_path}/x.jsonl", "not valid JSON")
    assert start > 10_000
    assert str(LineError(path, start, index, message)).startswith(f"{tmp_path}/x.jsonl:21: not valid JSON")


@pytest.mark.parametrize("document", ["file", "paragraph", "line"])
@pytest.mark.parametrize(("content", "reason"), [(b"caf\xe9\n", "not UTF-8"), (b"a\0b\0\n", "NUL bytes")])
def test_odd_texts(tmp_path: Path, document: str, content: bytes, reason: str) -> None:
    (tmp_path / "good.txt").write_text("\n".join(GOOD[:1]))
    (tmp_path / "odd.txt").write_bytes(content)
    source = {"name": "txt", "paths": [f"{tmp_path}/*.txt"], "document": document}
    assert f"{tmp_path}/odd.txt{'' if document == 'file' else ':1'}: " in error_of(tmp_path, source)
    shutil.rmtree(tmp_path / "out")
    assert manifest_of(prepare_one(tmp_path, source, on_error="skip")).skipped["documents"] == {reason: 1}


def test_a_damaged_file_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    import gzip

    write_jsonl(tmp_path / "x.jsonl", GOOD)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in documents(300, first=100)).encode()
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(rows)[:-2000])
    source = jsonl_source(tmp_path / "x.jsonl", tmp_path / "y.jsonl.gz")
    message = (
        f"{tmp_path}/y.jsonl.gz: cannot be read: Compressed file ended before the end-of-stream marker was reached"
    )
    assert error_of(tmp_path, source) == message
    shutil.rmtree(tmp_path / "out")
    train = prepare_one(tmp_path, source, on_error="skip")
    texts = read_texts(train)
    assert texts == [*GOOD, *documents(300, first=100)][: len(texts)]
    assert len(texts) > 100
    assert manifest_of(train).skipped["documents"] == {"damaged file": 1}


def invalid_strings(raw: list[bytes]) -> Any:
    array = pa.array(raw, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(array), array.buffers())


TYPES = {
    "null": pa.nulls(20),
    "string_view": pa.array(GOOD, pa.string_view()),
    "large_string": pa.array(GOOD, pa.large_string()),
    "dictionary": pa.array(GOOD).dictionary_encode(),
    "binary": pa.array([text.encode() for text in GOOD], pa.binary()),
    "large_binary": pa.array([text.encode() for text in GOOD], pa.large_binary()),
    "surrogate": invalid_strings([b"half \xed\xa0\xbd.", *(text.encode() for text in GOOD[1:])]),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["parquet", "datasets"])
def test_types_of_text_columns(tmp_path: Path, kind: str, name: str) -> None:
    import datasets

    first, array = pa.table({"text": ["the first"]}), TYPES[kind]
    if name == "parquet":
        pq.write_table(first, tmp_path / "a.parquet")
        pq.write_table(pa.table({"text": array}), tmp_path / "b.parquet")
        source = {"name": "parquet", "paths": [f"{tmp_path}/*.parquet"]}
        wanted = ["the first"]
    else:
        datasets.Dataset(pa.table({"text": array})).save_to_disk(str(tmp_path / "hf"))
        source, wanted = {"name": "datasets", "path": str(tmp_path / "hf")}, []
    if kind == "null" and name == "datasets":
        assert error_of(tmp_path, source).endswith("streams.s: holds no document: 20 empty")
        return
    if kind == "surrogate":
        wanted += ["half \ufffd.", *GOOD[1:]]
    elif kind != "null":
        wanted += [value.decode() if isinstance(value, bytes) else value for value in array.to_pylist()]
    assert read_texts(prepare_one(tmp_path, source)) == wanted


@pytest.mark.parametrize("name", ["parquet", "datasets"])
def test_arrow_strings_that_are_not_utf8(tmp_path: Path, name: str) -> None:
    import datasets

    table = pa.table({"text": invalid_strings([*(text.encode() for text in GOOD), b"caf\xe9!", b"last"])})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=15)
    datasets.Dataset(table).save_to_disk(str(tmp_path / "hf"))
    parquet = name == "parquet"
    source = {"name": name, **({"paths": [str(tmp_path / "x.parquet")]} if parquet else {"path": str(tmp_path / "hf")})}
    place = f"{tmp_path}/x.parquet: row group 1, row 5" if parquet else f"{tmp_path}/hf: row 20"
    what = "column 'text': not UTF-8 text (invalid continuation byte at byte 3): convert it first"
    assert error_of(tmp_path, source) == f"{place}: {what}"
    shutil.rmtree(tmp_path / "out")
    train = prepare_one(tmp_path, source, on_error="skip")
    assert read_texts(train) == [*GOOD, "last"]
    assert manifest_of(train).skipped["documents"] == {"not UTF-8": 1}


def test_what_max_bytes_leaves_out_is_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", documents(60))
    manifest = manifest_of(prepare_one(tmp_path, jsonl_source(tmp_path / "x.jsonl"), max_bytes=20_000))
    assert manifest.over_max_bytes == 60 - manifest.documents > 0


# Tokenizers.


def load(folder: Path, model: Any, pre_tokenizer: Any = None) -> dict[str, Any]:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "t.json"))
    return {"name": "load", "path": str(folder / "t.json")}


WITHOUT_UNKNOWN = {
    "WordLevel": lambda: models.WordLevel({"A": 0, "C": 1, "G": 2}),
    "WordPiece": lambda: models.WordPiece({"A": 0, "C": 1, "G": 2}),
    "Unigram": lambda: models.Unigram([("A", -1.0), ("C", -1.5), ("G", -2.0)]),
    "BPE": lambda: models.BPE({"A": 0, "C": 1, "G": 2}, []),  # left out what it does not know, without a word
}


@pytest.mark.parametrize("kind", WITHOUT_UNKNOWN)
def test_tokenizer_without_an_unknown_token(tmp_path: Path, kind: str) -> None:
    texts = ["A C G", "C A", "G G A"]
    tokenizer = load(tmp_path, WITHOUT_UNKNOWN[kind]())
    write_jsonl(tmp_path / "known.jsonl", texts)
    train = prepare_one(tmp_path, jsonl_source(tmp_path / "known.jsonl"), tokenizer=tokenizer)
    manifest = manifest_of(train)
    assert (manifest.tokens, manifest.unknown_tokens, manifest.unk_token_id) == (8, 0, None)
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer" / "tokenizer.json")).token_to_id("[UNK]") is None
    shutil.rmtree(tmp_path / "out")
    write_jsonl(tmp_path / "more.jsonl", [*texts, "A N"])
    assert error_of(tmp_path, jsonl_source(tmp_path / "more.jsonl"), tokenizer=tokenizer) == (
        f"{tmp_path}/more.jsonl: document that begins 'A N': the tokenizer ({kind}) has no unknown token, and does not "
        "know 'N': give it one, or choose another tokenizer"
    )


@pytest.mark.parametrize("known", [0, 100, 199, 200])
def test_share_of_unknown_tokens(tmp_path: Path, known: int, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load(tmp_path, models.WordLevel({"oov": 0, "[UNK]": 1, "yes": 2}, unk_token="oov"))
    rows = [f"{number} no" for number in range(200 - known)] + [
        ("yes " * (number + 2)).strip() for number in range(known)
    ]
    write_jsonl(tmp_path / "x.jsonl", rows)
    train = prepare_one(tmp_path, jsonl_source(tmp_path / "x.jsonl"), tokenizer=tokenizer)
    words = " ".join(rows).split()
    share = 100 * sum(word != "yes" for word in words) / len(words)
    manifest = manifest_of(train)
    assert (manifest.unknown_tokens, manifest.tokens) == (sum(word != "yes" for word in words), len(words))
    assert manifest.unk_token_id == 0  # what the model gives, not what its vocabulary calls [UNK]
    said = capsys.readouterr().err
    assert f"({share:.2f} % of them unknown)" in said
    assert (f"warning: s/train: {share:.2f} % of them unknown (id 0): the tokenizer does not know" in said) == (
        share >= 1
    )
    assert f"unknown    {manifest.unknown_tokens:,} tokens ({share:.2f} %)" in shown(train, samples=0)


@pytest.mark.parametrize(
    ("fraction", "message"),
    [
        (0, "holds no document that gives a token (60 do not): choose another source or tokenizer"),
        (0.1, "holds no document that gives a token (60 do not): choose another source or tokenizer"),
    ],
)
def test_streams_without_tokens(tmp_path: Path, fraction: float, message: str) -> None:
    write_jsonl(tmp_path / "x.jsonl", [" " * (number + 1) for number in range(60)])
    tokenizer = load(tmp_path, models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    for _ in range(3):
        said = error_of(tmp_path, jsonl_source(tmp_path / "x.jsonl"), tokenizer=tokenizer, validation_fraction=fraction)
        assert (
            said
            == f"{tmp_path}/prepare.yaml: streams.s: {message}; then delete {tmp_path}/out, or choose another output"
        )


def test_validation_without_tokens(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", ["a a", *(" " * (number + 1) for number in range(60))])
    tokenizer = load(tmp_path, models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    said = [
        error_of(tmp_path, jsonl_source(tmp_path / "x.jsonl"), tokenizer=tokenizer, validation_fraction=share)
        for share in (0.2, 0.2)
    ]
    wanted = (
        r"streams\.s: none of the \d+ documents in (validation gives a token: raise|train gives a token: lower) valid"
    )
    assert all(re.search(wanted, line) for line in said)
    assert (tmp_path / "out" / "tokenizer").exists()  # nothing is lost


# Sources that change.


def test_changed_sources_of_a_finished_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = documents(60)
    write_jsonl(tmp_path / "set" / "a.jsonl", texts[:30])
    write_jsonl(tmp_path / "set" / "b.jsonl", texts[30:])
    source = jsonl_source(tmp_path / "set")
    prepare_one(tmp_path, source)
    a, b, c = (tmp_path / "set" / name for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    prepare_one(tmp_path, source)
    assert capsys.readouterr().err.endswith("out: already prepared\n")
    before = a.read_bytes()
    a.write_bytes(before)  # another time of writing, the same content
    (tmp_path / "set" / "notes.md").write_text("no part of it")
    prepare_one(tmp_path, source)
    a.write_bytes(before.replace(b"0", b"1", 1))  # the same size
    start = f"{tmp_path}/prepare.yaml: streams.s.source: the files are no longer those that it was prepared from: "
    fix = f"{tmp_path}/out holds the old ones, whole: to prepare the new ones delete it, or choose another output"
    assert error_of(tmp_path, source) == f"{start}1 changed ({a}): {fix}"
    write_jsonl(c, texts[:5])
    b.unlink()
    assert error_of(tmp_path, source) == f"{start}1 added ({c}), 1 removed ({b}), 1 changed ({a}): {fix}"
    shutil.rmtree(tmp_path / "set")
    assert f"streams.s.source: paths: nothing matches {str(tmp_path / 'set')!r}" in error_of(tmp_path, source)


def test_datasets_that_were_prepared_before_this(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As older versions left them: no sources.json, no on_error in prepare.json, fewer facts in stream.json."""
    write_jsonl(tmp_path / "x.jsonl", GOOD)
    train = prepare_one(tmp_path, jsonl_source(tmp_path / "x.jsonl"))
    (tmp_path / "out" / "sources.json").unlink()
    for path, keys in [
        (tmp_path / "out" / "prepare.json", ["on_error"]),
        (train / MANIFEST, ["over_max_bytes", "unknown_tokens", "read", "skipped"]),
    ]:
        node = json.loads(path.read_text())
        for key in keys:
            (node["streams"]["s"] if key == "on_error" else node).pop(key)
        path.write_text(json.dumps(node))
    capsys.readouterr()
    write_jsonl(tmp_path / "x.jsonl", GOOD[:5])
    prepare_one(tmp_path, jsonl_source(tmp_path / "x.jsonl"))
    assert "already prepared, before prepare recorded what from" in capsys.readouterr().err
    assert open_stream(train).manifest.unknown_tokens is None
    inspect(train, samples=1)
    with pytest.raises(ConfigError, match="streams.s.on_error was 'fail', is 'skip'"):
        prepare_one(tmp_path, jsonl_source(tmp_path / "x.jsonl"), on_error="skip")


def test_fuzz() -> None:
    """A short one; benchmarks.fuzz_prepare is the long one."""
    result = fuzz(24, seed=5, command_every=0)
    assert result.failures == []
    assert result.cases == 24
    assert result.codes[0] >= 8
    assert result.files > 20
