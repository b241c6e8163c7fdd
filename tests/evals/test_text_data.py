"""Files of labelled texts: GLUE's own layouts with their quirks, and other people's."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from evals.text_data import Columns, read_rows
from evals.text_scores import scored
from evals.text_tasks import TextTask, load_task
from flexbert_core.schema import ConfigError, validate

# The first lines of GLUE's files, in their columns; the texts are ours.
OFFICIAL = {
    "CoLA": {"train.tsv": 'gj04\t1\t\tShe "sang.\ngj04\t0\t*\tSang she.\n', "dev.tsv": "gj04\t1\t\tHe ran.\n"},
    "SST-2": {"train.tsv": "sentence\tlabel\nfine \t1\nbad \t0\n", "dev.tsv": "sentence\tlabel\nso so\t0\n"},
    "MRPC": {
        "train.tsv": '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tA "b c\tA b\n0\t7\t9\tD\tE\n',
        "dev.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n0\t1\t2\tF\tG\r\n",
    },
    "STS-B": {
        "train.tsv": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tg\tf\ty\to\ts\tt\tA\tB\t5.000\n",
        "dev.tsv": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tg\tf\ty\to\ts\tt\tC\tD\t1.25\n",
    },
    "RTE": {
        "train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tentailment\n1\tC\tD\tnot_entailment\n",
        "dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\tE\tF\tnot_entailment\n",
    },
    "MNLI": {
        "train.tsv": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
        "0\t1\t1n\tg\tp\tp\tp\tp\tA\tB\tneutral\tneutral\n",
        "dev_matched.tsv": "index\tsentence1\tsentence2\tgold_label\n0\tC\tD\tentailment\n",
        "dev_mismatched.tsv": "index\tsentence1\tsentence2\tgold_label\n0\tE\tF\tcontradiction\n",
    },
    "AX": {"diagnostic.tsv": "index\tsentence1\tsentence2\n0\tA\tB\n"},
}


@pytest.fixture
def glue(tmp_path: Path) -> Path:
    for task, files in OFFICIAL.items():
        (tmp_path / task).mkdir()
        for name, text in files.items():
            (tmp_path / task / name).write_bytes(text.encode())
    return tmp_path


def task(glue: Path, **node: Any) -> Any:
    return load_task(validate(TextTask, node, "tasks"), str(glue), None)


def test_official_files_are_read_as_they_are(glue: Path) -> None:
    cola = task(glue, name="cola")
    assert cola.train.texts == ['She "sang.', "Sang she."]
    assert cola.train.labels == [1, 0]
    assert cola.train.pairs is None
    mrpc = task(glue, name="mrpc")
    assert (mrpc.train.texts, mrpc.train.pairs, mrpc.train.labels) == (['A "b c', "D"], ["A b", "E"], [1, 0])
    assert (mrpc.dev[""].pairs, mrpc.starts_from) == (["G"], "mnli")
    assert task(glue, name="sst2").train.texts == ["fine ", "bad "]
    stsb = task(glue, name="stsb")
    assert (stsb.train.labels, stsb.num_labels, stsb.dev[""].labels) == ([5.0], 1, [1.25])
    assert task(glue, name="rte").train.labels == [0, 1]
    mnli = task(glue, name="mnli")
    assert (mnli.train.pairs, mnli.train.labels) == (["B"], [1])
    assert {name: rows.labels for name, rows in mnli.dev.items()} == {"m": [0], "mm": [2]}


def test_the_diagnostic_set_is_read_with_its_labels_or_without(glue: Path) -> None:
    assert task(glue, name="ax").dev[""].labels is None
    header = "Lexical Semantics\tPremise\tHypothesis\tLabel\n"
    (glue / "AX" / "diagnostic-full.tsv").write_text(header + "x\tA\tB\tcontradiction\n")
    ax = task(glue, name="ax")
    assert (ax.dev[""].labels, ax.trained_on, ax.train) == ([2], "mnli", None)


def test_a_digest_is_of_what_a_task_reads(glue: Path) -> None:
    """Of its columns, of its labels, and of which split they are in."""
    base = {
        "name": "own",
        "data": str(glue / "MNLI"),
        "metrics": ["accuracy"],
        "labels": ["entailment", "contradiction"],
    }
    base |= {"label": "gold_label", "train": "dev_matched.tsv"}
    splits = ("dev_matched.tsv", "dev_mismatched.tsv")
    one = {**base, "text": "sentence1", "dev": dict(zip("ab", splits, strict=True))}
    assert task(glue, **one).digest == task(glue, **one).digest
    others = [{**one, "text": "sentence2"}, {**one, "dev": dict(zip("ba", splits, strict=True))}]
    digests = {task(glue, **each).digest for each in (one, *others)}
    assert len(digests) == 3


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_other_formats_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [{"said": 'a, "b"\tc', "about": "x", "mark": "up"}, {"said": "d", "about": "y", "mark": "down"}]
    for name in ("train", "dev"):
        file = tmp_path / f"{name}.{suffix}"
        if suffix == "jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif suffix == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        else:
            file.write_text('said,about,mark\n"a, ""b""\tc",x,up\nd,y,down\n')
    node = {"name": "mine", "data": str(tmp_path), "train": f"train.{suffix}", "dev": {"": f"dev.{suffix}"}}
    found = task(tmp_path, **node, text="said", pair="about", label="mark", metrics=["accuracy", "f1"])
    assert found.classes == ("down", "up")
    assert (found.train.texts, found.train.pairs, found.train.labels) == (['a, "b"\tc', "d"], ["x", "y"], [1, 0])


def test_a_few_broken_rows_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = ["sentence\tlabel", *(f"s{number}\t1" for number in range(300)), "broken\tby\ta tab", "last\t0"]
    (tmp_path / "t.tsv").write_text("\n".join(lines) + "\n")
    rows = read_rows(tmp_path / "t.tsv", Columns("sentence", None, "label"))
    assert len(rows) == 301
    assert rows.texts[-1] == "last"
    assert f"{tmp_path}/t.tsv: 1 rows have other columns and are left out, the first in line 302" in caplog.text


@pytest.mark.parametrize(
    ("node", "change", "message"),
    [
        (
            {"name": "rte"},
            {"RTE/train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tmaybe\n"},
            "row 1: 'maybe' is no class; they are: entailment, not_entailment",
        ),
        ({"name": "rte"}, {"RTE/dev.tsv": "index\tsentence1\tsentence2\n0\tA\tB\n"}, "no column 'label', "),
        (
            {"name": "rte"},
            {"RTE/dev.tsv": "index\tsentence1\n0\tA\tB\n1\tC\n"},
            r"dev\.tsv:2: 3 columns, in the first line 2",
        ),
        (
            {"name": "stsb"},
            {"STS-B/dev.tsv": "sentence1\tsentence2\tscore\nA\tB\tmuch\n"},
            "row 1: 'much' is no number",
        ),
        ({"name": "rte", "train": "trian.tsv"}, {}, r"trian\.tsv: no such file; there are: dev\.tsv, train\.tsv"),
        ({"name": "rte", "train": "train.txt"}, {}, r"train\.txt: expected one of \.tsv, \.csv, \.jsonl, \.parquet"),
        ({"name": "qqp"}, {}, "no folder QQP in it"),
        ({"name": "mnli", "metrics": ["f1"]}, {}, "f1 is of two classes, there are 3: use accuracy"),
        ({"name": "rte", "metrics": ["spearman"]}, {}, "spearman is no metric of classes"),
        ({"name": "glu"}, {}, r"'glu' is no task of GLUE .*; of your own give text, too"),
        ({"name": "rte"}, {"RTE/train.tsv": b"\xff\xfe"}, r"train\.tsv: is no UTF-8 text"),
        ({"name": "rte"}, {"RTE/train.tsv": "index\tsentence1\tsentence2\tlabel\n"}, r"train\.tsv: holds no rows"),
    ],
)
def test_what_is_wrong_is_named(glue: Path, node: Any, change: dict[str, Any], message: str) -> None:
    for name, text in change.items():
        (glue / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        task(glue, **node)


def test_scores_by_hand() -> None:
    labels, found = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]
    # true positives 2, false positives 1, false negatives 1, true negatives 1
    mcc = (2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5
    assert scored(["accuracy", "f1", "mcc"], labels, found) == pytest.approx(
        {"accuracy": 3 / 5, "f1": 2 / 3, "mcc": mcc, "score": (3 / 5 + 2 / 3 + mcc) / 3}
    )
    # ranks 1 2 3 against 1 3 2: 1 - 6 * 2 / (3 * 8); deviations -1 0 1 against -2 1 1
    assert scored(["pearson", "spearman"], [1.0, 2.0, 3.0], [0.0, 3.0, 3.0 - 1e-9]) == pytest.approx(
        {"pearson": 3 / (2 * 6) ** 0.5, "spearman": 0.5, "score": (3 / 12**0.5 + 0.5) / 2}
    )


def test_a_constant_scores_nothing_where_it_has_no_score() -> None:
    assert scored(["pearson", "spearman"], [1.0, 2.0], [3.0, 3.0])["score"] == 0
    assert scored(["mcc", "f1"], [0, 1], [0, 0])["score"] == 0


def test_a_line_separator_inside_a_text_ends_no_row_of_jsonl(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"said": "a\u2028b", "mark": 1}, ensure_ascii=False) + "\n")
    assert read_rows(tmp_path / "t.jsonl", Columns("said", None, "mark")).texts == ["a\u2028b"]


def own(folder: Path, marks: list[Any], suffix: str = "jsonl", dev: list[Any] | None = None, **node: Any) -> Any:
    """A task of one text a label."""
    for name, column in (("train", marks), ("dev", dev or marks)):
        rows = [{"said": f"text {number}", "mark": label} for number, label in enumerate(column)]
        if suffix == "tsv":
            lines = ["said\tmark", *(f"{row['said']}\t{row['mark']}" for row in rows)]
        else:
            lines = [json.dumps(row) for row in rows]
        (folder / f"{name}.{suffix}").write_text("\n".join(lines) + "\n")
    files = {"data": str(folder), "train": f"train.{suffix}", "dev": {"": f"dev.{suffix}"}}
    return task(folder, **{"name": "mine", "text": "said", "label": "mark", "metrics": ["accuracy"], **files, **node})


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        ([1, 2, 2], None, [0, 1, 1]),
        ([1, 2, 3, 4, 5], None, [0, 1, 2, 3, 4]),
        ([0, 1], ["1", "0"], [1, 0]),
        ([0, 1, 2], ["no", "maybe", "yes"], [0, 1, 2]),
        ([0, 4], ["1", "2", "3", "4", "5"], [0, 4]),
        ([1, -1], None, [1, 0]),
    ],
)
def test_whole_numbers_are_classes_by_name_where_they_are_names(
    tmp_path: Path, labels: list[int], classes: list[str] | None, numbers: list[int]
) -> None:
    found = own(tmp_path, labels, labels=classes)
    assert found.train.labels == found.dev[""].labels == numbers
    if {str(label) for label in labels} <= set(found.classes):
        assert own(tmp_path, labels, "tsv", labels=classes).train.labels == numbers


def test_a_number_that_is_no_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tasks: mine: dev: row 2: 0 is no class; they are: 1, 2"):
        own(tmp_path, [1, 2], dev=[1, 0])
    with pytest.raises(ConfigError, match=r"train: row 2: 2 is no class, nor the number of one from 0: 1, 2"):
        own(tmp_path, [0, 2], labels=["1", "2"])
    with pytest.raises(ConfigError, match="tasks: mine: trained_on: give labels, the classes of mnli"):
        own(tmp_path, [1, 2], trained_on="mnli")


@pytest.mark.parametrize("label", ["nan", "inf", None])
def test_a_score_is_a_finite_number(tmp_path: Path, label: Any) -> None:
    with pytest.raises(ConfigError, match=f"train: row 2: {label!r} is no number"):
        own(tmp_path, [1.0, label], metrics=["spearman"])


def test_texts_of_a_csv_are_whole(tmp_path: Path) -> None:
    """Line ends within quotes stay; other separators and form feeds end nothing; empty lines are no rows."""
    columns, long = Columns("said", None, "mark"), "x" * 200_000
    text = f'said,mark\r\n"first line\r\nsecond line",1\r\n\r\na\u2028b\x0cc\u0085d,0\r\n{long},1\r\n'
    (tmp_path / "t.csv").write_bytes(text.encode())
    rows = read_rows(tmp_path / "t.csv", columns)
    assert rows.texts == ["first line\r\nsecond line", "a\u2028b\x0cc\u0085d", long]
    assert rows.labels == ["1", "0", "1"]
    (tmp_path / "t.csv").write_text('said,mark\n"a\nb",1\n\n"c,0\nd,1\n')
    with pytest.raises(ConfigError, match=r"t\.csv:5: is no CSV: unexpected end of data"):
        read_rows(tmp_path / "t.csv", columns)


def test_only_line_feeds_end_rows_of_a_tsv(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_bytes("said\tmark\na\rb\x0cc\u2028d\t1\r\n\r\ne\t0\n\n".encode())
    rows = read_rows(tmp_path / "t.tsv", Columns("said", None, "mark"))
    assert (rows.texts, rows.labels) == (["a\rb\x0cc\u2028d", "e"], ["1", "0"])
