"""Retrieval sets as they lie on disk."""

import json
from pathlib import Path

import pytest

from evals.beir import Example, read_beir, read_triples, sampled
from flexbert_core.schema import ConfigError
from tests.helpers.sentences import write_beir


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_beir(tmp_path / "set")


def test_a_folder_is_read(folder: Path) -> None:
    data = read_beir(folder, ["test", "train"])
    assert (data.name, len(data.documents)) == ("set", 30)
    assert data.documents["sea-0"].startswith("sea "), "the title stands before the text"
    assert list(data.splits) == ["test", "train"]
    assert list(data.splits["test"].queries) == [
        f"test-{topic}-0" for topic in dict.fromkeys(name[:-2] for name in data.documents)
    ]
    assert data.splits["test"].relevance["test-sea-0"] == {"sea-0": 3, "sea-1": 2, "sea-2": 1}
    assert len(data.splits["train"].queries) == 20


def test_other_bytes_are_other_data(folder: Path) -> None:
    before = read_beir(folder, ["test"]).digest
    assert read_beir(folder, ["test", "train"]).digest != before
    (folder / "qrels/test.tsv").write_text((folder / "qrels/test.tsv").read_text().replace("\t3\n", "\t4\n"))
    assert read_beir(folder, ["test"]).digest != before


def replace_line(file: Path, number: int, line: str) -> None:
    lines = file.read_text().split("\n")
    lines[number - 1] = line
    file.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("file", "number", "line", "message"),
    [
        ("corpus.jsonl", 2, "{", "corpus.jsonl:2: not valid JSON"),
        ("corpus.jsonl", 2, "[1]", "corpus.jsonl:2: expected an object, got list"),
        ("corpus.jsonl", 2, '{"_id": "a"}', "corpus.jsonl:2: has no 'text'"),
        ("corpus.jsonl", 2, '{"_id": 7, "text": "a"}', "corpus.jsonl:2: _id: expected text, got 7"),
        ("corpus.jsonl", 2, '{"_id": "sea-0", "text": "a"}', "corpus.jsonl:2: _id: 'sea-0' stands there twice"),
        ("corpus.jsonl", 2, '{"_id": "a", "text": "a", "title": 1}', "corpus.jsonl:2: title: expected text, got 1"),
        ("queries.jsonl", 1, '{"_id": "a", "text": null}', "queries.jsonl:1: text: expected text, got None"),
        ("qrels/test.tsv", 1, "query\tdocument\tscore", "qrels/test.tsv:1: expected the header"),
        ("qrels/test.tsv", 3, "a b c", "qrels/test.tsv:3: expected 3 columns between tabs, got 1"),
        ("qrels/test.tsv", 3, "nobody\tsea-0\t1", "qrels/test.tsv:3: query-id: 'nobody' is not in queries.jsonl"),
        (
            "qrels/test.tsv",
            3,
            "test-sea-0\tsea-0\thigh",
            "qrels/test.tsv:3: score: expected a whole number, got 'high'",
        ),
        (
            "qrels/test.tsv",
            3,
            "test-sea-0\tgone\t1",
            "qrels/test.tsv:3: corpus-id: 'gone' is not in corpus.jsonl, as 1 of 30",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_line(folder: Path, file: str, number: int, line: str, message: str) -> None:
    replace_line(folder / file, number, line)
    with pytest.raises(ConfigError) as error:
        read_beir(folder, ["test"])
    assert message in str(error.value)


def test_a_split_that_is_not_there_is_said_with_those_that_are(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"qrels/dev\.tsv: no such file: .*; its splits: test, train"):
        read_beir(folder, ["dev"])
    with pytest.raises(ConfigError, match="no such folder"):
        read_beir(folder / "nothing", ["test"])


def test_a_few_lost_documents_are_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = "".join(f"train-sea-0\tsea-{number % 3}\t1\n" for number in range(200))
    (folder / "qrels/train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}train-sea-0\tgone\t1\n")
    data = read_beir(folder, ["train"])
    assert "corpus-id: 'gone' is not in corpus.jsonl; 1 of 201: they count as not found" in caplog.text
    assert data.splits["train"].relevance["train-sea-0"]["gone"] == 1


def test_a_sample_keeps_what_is_judged(folder: Path) -> None:
    data = read_beir(folder, ["test"])
    small = sampled(data, "test", 10, 3, seed=1)
    assert len(small.splits["test"].queries) == len(small.splits["test"].relevance) == 3
    judged = {name for row in small.splits["test"].relevance.values() for name in row}
    assert judged < small.documents.keys()
    assert len(small.documents) == 10
    assert sampled(data, "test", 10, 3, seed=1) == small
    assert sampled(data, "test", 10, 3, seed=2) != small
    assert sampled(data, "test", 99, 99, seed=1) == data


def test_triples_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.tsv").write_text("q one\tyes\tno\nq two\tyes 2\tno 2\tno 3\n")
    assert read_triples(tmp_path / "a.tsv") == [Example("q one", "yes", ("no",)), Example("q two", "yes 2", ("no 2",))]
    assert f"{tmp_path}/a.tsv:1: has 1 negatives, others up to 2: 1 are taken of each" in caplog.text
    rows = [{"query": "q", "positive": "p", "negative": ["n", "m"]}, {"query": "r", "positive": "s", "negative": "t"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert read_triples(tmp_path / "a.jsonl") == [Example("q", "p", ("n",)), Example("r", "s", ("t",))]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "only a query\n", "a.tsv:1: expected query, positive and negatives between tabs, got 1 texts"),
        ("a.tsv", "", "a.tsv: holds no triples"),
        ("a.tsv", "q\tp\tn\n\nr\ts\nt\tu\tv\n", "a.tsv:3: has no negative, where others have up to 1: give it some"),
        ("a.jsonl", '{"query": "q"}', "a.jsonl:1: has no 'positive'"),
        (
            "a.jsonl",
            '{"query": "q", "positive": "p", "negative": [1]}',
            "a.jsonl:1: negative: expected a text or a list",
        ),
        ("a.txt", "q", r"a.txt: expected a .tsv or .jsonl file"),
    ],
)
def test_what_is_wrong_with_triples_is_said(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        read_triples(tmp_path / name)
    assert message in str(error.value)
