"""Every source reads real tiny files; its units cover them once and in order; its errors name file and place."""

import gzip
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.preparation.sources import SOURCES, LineError
from data.preparation.sources import base as sources_base
from data.preparation.sources.builtin import is_readable
from flexbert_core.schema import ConfigError, RunError
from tests.data.preparation.reading import COMPRESS, ROWS, TEXTS, build, jsonl, read_all


@pytest.mark.parametrize("suffix", COMPRESS)
def test_jsonl_plain_and_compressed(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(
        COMPRESS[suffix](b"\xef\xbb\xbf" + jsonl().replace(b"\n", b"\r\n\r\n", 3))
    )
    assert read_all({"name": "jsonl", "paths": [str(tmp_path)]}) == TEXTS


def test_the_number_of_a_late_line_takes_little_memory(tmp_path: Path) -> None:
    line = b"x" * 99 + b"\n"
    (tmp_path / "a.txt").write_bytes(line * 300_000)
    tracemalloc.start()
    try:
        said = str(LineError(str(tmp_path / "a.txt"), 29_000_001, 5, "is odd"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert said == f"{tmp_path}/a.txt:290007: is odd"
    assert peak < 4 * 2**20


def test_a_line_of_a_file_that_is_gone_is_named_by_its_byte(tmp_path: Path) -> None:
    assert (
        str(LineError(f"{tmp_path}/a.txt", 5000, 5, "is odd")) == f"{tmp_path}/a.txt: line 6 from byte 5,000 on: is odd"
    )


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kept", [0.5, 0.98])
def test_cut_off_compressed_file_is_an_error_that_names_it(tmp_path: Path, suffix: str, kept: float) -> None:
    content = COMPRESS[suffix](jsonl())
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(RunError, match=f"a.jsonl{suffix}: cannot be read: "):
        read_all({"name": "jsonl", "paths": [str(path)]})


@pytest.mark.parametrize("range_bytes", [1, 7, 64, 100, 1000])
def test_byte_ranges_give_every_line_once_in_order(
    tmp_path: Path, range_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_base, "RANGE_BYTES", range_bytes)
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl())
    source = build({"name": "jsonl", "paths": [str(path)]})
    assert sum(unit.bytes for unit in source.find().units) == path.stat().st_size
    assert [text for unit in source.find().units for text in source.read(unit)] == TEXTS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"a\.jsonl:42: not valid JSON"),
        ('{"txet": "x"}', r"a\.jsonl:42: no column 'text', did you mean 'txet'\?"),
        ('{"text": 3}', r"a\.jsonl:42: column 'text' holds a number, expected a string"),
        ("[1]", r"a\.jsonl:42: expected a JSON object, got a list"),
        ('{"text": tru}', r"a\.jsonl:42: not valid JSON"),
    ],
)
@pytest.mark.parametrize("range_bytes", [100, 10**6])
def test_bad_line_is_named_by_its_number(
    tmp_path: Path, line: str, message: str, range_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_base, "RANGE_BYTES", range_bytes)
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(ROWS[:41]) + line.encode() + b"\n" + jsonl(ROWS[41:]))
    with pytest.raises(RunError, match=message):
        read_all({"name": "jsonl", "paths": [str(path)]})


def test_txt_documents(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("second \u00e9\r\nline\n\n \nnext\n".encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbffirst"))
    (tmp_path / "c.md").write_text("not matched")
    node = {"name": "txt", "paths": [str(tmp_path)]}
    assert read_all(node) == ["first", "second \u00e9\r\nline\n\n \nnext\n"]
    assert read_all({**node, "document": "paragraph"}) == ["first", "second \u00e9\r\nline", "next"]
    assert read_all({**node, "document": "line"}) == ["first", "second \u00e9", "line", "", " ", "next"]


def test_paragraphs_keep_their_indentation(tmp_path: Path) -> None:
    code = b"\xef\xbb\xbf\n \t\n\n  def f():\n    a = 1\n\n    b = 2  \n\t\r\n\r\n\tc\n \n"
    (tmp_path / "a.txt").write_bytes(code)
    node = {"name": "txt", "paths": [str(tmp_path)], "document": "paragraph"}
    assert read_all(node) == ["  def f():\n    a = 1", "    b = 2  ", "\tc"]


def test_txt_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 latin")
    node = {"name": "txt", "paths": [str(tmp_path / "*.txt")]}
    with pytest.raises(RunError, match=r"a\.txt: not UTF-8 text \(.* at byte 3\)"):
        read_all(node)
    (tmp_path / "a.txt").write_bytes(b"first\n\n\nsecond\ncaf\xe9 latin\n\nthird")
    with pytest.raises(RunError, match=r"a\.txt:4: not UTF-8 text \(.* at byte 10\)"):
        read_all({**node, "document": "paragraph"})


@pytest.mark.parametrize("name", ["txt", "jsonl", "parquet", "code"])
def test_path_that_matches_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^paths: nothing matches '.*/none/\*'"):
        build({"name": name, "paths": [str(tmp_path / "none" / "*")]}).find()


def test_a_folder_that_is_empty_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"^paths: '.*/none' is empty$"):
        build({"name": "txt", "paths": [str(tmp_path / "none")]}).find()


def test_overlapping_globs_give_a_file_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("once")
    assert read_all({"name": "txt", "paths": [str(tmp_path), str(tmp_path / "*.txt")]}) == ["once"]


def test_parquet_units_are_row_groups(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": [*TEXTS, None]}), tmp_path / "a.parquet", row_group_size=7)
    node = {"name": "parquet", "paths": [str(tmp_path)], "text_column": "body"}
    assert read_all(node) == [*TEXTS, ""]
    assert len(build(node).find().units) == 8
    with pytest.raises(ConfigError, match=r"text_column: .*a\.parquet has no column 'bdy', did you mean 'body'\?"):
        read_all({**node, "text_column": "bdy"})


def test_parquet_column_of_numbers_and_damaged_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="column 'text' holds int64, expected strings"):
        read_all({"name": "parquet", "paths": [str(tmp_path)]})
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is no parquet file")
    with pytest.raises(RunError, match=r"a\.parquet: cannot be read: "):
        read_all({"name": "parquet", "paths": [str(tmp_path)]})


def test_saved_dataset(tmp_path: Path) -> None:
    import datasets

    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(str(tmp_path / "many"))
    dataset.select([]).save_to_disk(str(tmp_path / "none"))
    assert read_all({"name": "datasets", "path": str(tmp_path / "one")}) == TEXTS
    assert read_all({"name": "datasets", "path": str(tmp_path / "many"), "split": "test"}) == TEXTS[:1]
    for node, message in [
        ({"path": str(tmp_path / "many"), "split": "tset"}, "split: .*many has no split 'tset', did you mean 'test'"),
        ({"path": str(tmp_path / "one"), "text_column": "txt"}, "text_column: no column 'txt', did you mean 'text'"),
        ({"path": str(tmp_path)}, "is no folder written by save_to_disk"),
        ({"path": str(tmp_path / "none")}, "none: lists no data files, so it holds no rows: leave it out"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build({"name": "datasets", **node}).find()


def test_a_hub_dataset_is_opened_once_and_at_one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task of each pass builds its source anew; the hub has rate limits, and new commits."""
    import datasets
    import huggingface_hub

    opened, commit = [], ["1a"]

    def load(name: str, config: str | None, *, split: str, revision: str | None) -> object:
        opened.append((name, split, revision))
        return datasets.Dataset.from_list(ROWS)

    def info(self: object, name: str) -> object:
        return SimpleNamespace(sha=commit[0])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    node = {"name": "datasets", "hub": "nobody/opened-once", "split": "train"}
    (unit,) = build(node).find().units
    assert unit.path == "nobody/opened-once@1a"
    commit[0] = "2b"
    assert [list(build(node).read(unit)) for _ in range(3)] == [TEXTS] * 3
    assert opened == [("nobody/opened-once", "train", "1a")]
    assert build(node).find().units[0].path.endswith("@2b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (unit,) = build(node).find().units
    assert unit.path == "nobody/opened-once"
    assert list(build(node).read(unit)) == TEXTS
    assert [revision for *_, revision in opened] == ["1a", "2b", None]


def test_dataset_place_must_be_clear() -> None:
    for node in ({}, {"path": "a", "hub": "b"}):
        with pytest.raises(ValueError, match="give either path"):
            SOURCES.parse({"name": "datasets", **node})


def test_code_tree(tmp_path: Path) -> None:
    for name, content in {
        "b.py": b"print(1)",
        "a/x.go": b"package x",
        "a/node_modules/y.js": b"ignored",
        ".git/z.py": b"hidden",
        "c.py": b"\xff\xfe binary",
        "d.py": b"nul \0",
        "e.csv": b"1,2",
        "f.py": b"#" * 2000,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    node = {"name": "code", "paths": [str(tmp_path)], "max_file_bytes": 1000}
    assert read_all(node) == ["package x", "print(1)"]
    assert read_all({**node, "suffixes": [".go"]}) == ["package x"]


@pytest.mark.parametrize("part", ["stdlib-code", "python-docs", "packages-docs"])
def test_builtin_holds_real_text_without_absolute_paths(part: str) -> None:
    source = build({"name": "builtin", "part": part})
    units = source.find().units
    assert len(units) > 100
    assert all(not unit.path.startswith("/") for unit in units)
    assert [unit.path for unit in units] == [
        unit.path for unit in build({"name": "builtin", "part": part}).find().units
    ]
    texts = [text for unit in units[:: len(units) // 40] for text in source.read(unit) if isinstance(text, str)]
    assert sum(map(len, texts)) > 20_000
    assert all(map(is_readable, texts))


def test_builtin_topics_and_docstrings() -> None:
    source = build({"name": "builtin", "part": "python-docs"})
    units = {unit.path: unit for unit in source.find().units}
    topics = list(source.read(units["stdlib/pydoc_data/topics.py"]))
    assert any(text.startswith('The "assert" statement') for text in topics)
    (docstrings,) = source.read(units["stdlib/argparse.py"])
    assert docstrings.startswith("Command-line parsing library")
    assert "ArgumentParser.exit" not in docstrings  # it has no docstring
    assert "\n\nArgumentParser\n\nObject for parsing command line strings" in docstrings


@pytest.mark.parametrize(
    "text",
    ["word " * 10, "0x1f, 1234, 9876,\n" * 100, "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo=" * 50, "a\0b c d e " * 100],
)
def test_unreadable(text: str) -> None:
    assert not is_readable(text)


def test_readable() -> None:
    assert is_readable("def function(argument):\n    return argument + 1\n" * 20)
    assert is_readable("\u4f60\u597d \u043f\u0440\u0438\u0432\u0435\u0442 " * 40)
