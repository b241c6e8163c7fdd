"""Every file that a path leads to is read, counted as left out, or refused by name: links, locks, names, compressions."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.helpers.preparing import (
    documents,
    error_of,
    jsonl_source,
    manifest_of,
    prepare_one,
    read_texts,
    write_jsonl,
)
from tests.helpers.users import as_nobody


def test_links_are_followed_and_each_file_is_read_once(tmp_path: Path) -> None:
    texts = documents(40)
    write_jsonl(tmp_path / "set" / "a" / "x.jsonl", texts[:10])
    write_jsonl(tmp_path / "disk2" / "deep" / "y.jsonl", texts[10:20])
    write_jsonl(tmp_path / "disk3" / "z.jsonl", texts[20:40])
    (tmp_path / "set" / "b").symlink_to("../disk2")
    (tmp_path / "set" / "z.jsonl").symlink_to("../disk3/z.jsonl")
    (tmp_path / "set" / "a" / "again.jsonl").symlink_to("x.jsonl")
    (tmp_path / "set" / "a" / "up").symlink_to("..")
    (tmp_path / "disk2" / "deep" / "round").symlink_to("../../set/b")
    for paths in ([tmp_path / "set"], [f"{tmp_path}/set/**/*.jsonl"], [f"{tmp_path}/set/*"]):
        train = prepare_one(tmp_path, jsonl_source(*paths), deduplicate="none", output=str(tmp_path / "out"))
        assert sorted(read_texts(train)) == sorted(texts)
        read = manifest_of(train).read
        assert read == {"files": 3, "documents": 40}
        (tmp_path / "out").rename(tmp_path / f"out-{len(list(tmp_path.iterdir()))}")
    train = prepare_one(tmp_path, jsonl_source(tmp_path / "set"))
    assert manifest_of(train).skipped["files"] == {"link to what is read by another name": 3}


@pytest.mark.parametrize("locked", ["set/b", "set/b/y.jsonl", "set/c"])
@pytest.mark.parametrize("pattern", ["set", "set/**/*.jsonl", "set/*"])
def test_what_is_locked_is_named(open_folder: Path, locked: str, pattern: str) -> None:
    for name in ("a", "b", "c/d"):
        write_jsonl(open_folder / "set" / name / "y.jsonl", documents(10))
    (open_folder / locked).chmod(0)
    with as_nobody():
        message = error_of(open_folder, jsonl_source(open_folder / pattern), on_error="skip")
    assert message == (
        f"{open_folder}/prepare.yaml: streams.s.source.paths: {open_folder / locked}: cannot be read: Permission denied"
    )


@pytest.mark.parametrize(("name", "target"), [("gone", "nowhere"), ("gone.jsonl", "nowhere"), ("me.jsonl", "me.jsonl")])
@pytest.mark.parametrize("pattern", ["set", "set/*"])
def test_broken_links_are_named(tmp_path: Path, name: str, target: str, pattern: str) -> None:
    write_jsonl(tmp_path / "set" / "x.jsonl", documents(10))
    (tmp_path / "set" / name).symlink_to(target)
    message = error_of(tmp_path, jsonl_source(tmp_path / pattern))
    where = "itself" if name == target else "what is not there"
    assert message.endswith(f"paths: {tmp_path / 'set' / name}: is a link to {where}: mend or remove it")


def test_what_is_no_file_does_not_hang(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "set" / "x.jsonl", documents(10))
    os.mkfifo(tmp_path / "set" / "a.jsonl")
    (tmp_path / "set" / "b.jsonl").symlink_to("/dev/zero")
    (tmp_path / "set" / ".hidden").mkdir()
    (tmp_path / "set" / "readme.md").write_text("read me")
    (tmp_path / "set" / "empty.jsonl").touch()
    train = prepare_one(tmp_path, jsonl_source(tmp_path / "set"))
    assert manifest_of(train).read == {"files": 1, "documents": 10}
    assert manifest_of(train).skipped == {
        "files": {"*.md": 1, "0 bytes": 1, "hidden folder": 1, "not a regular file": 2},
        "documents": {},
    }
    (tmp_path / "out").rename(tmp_path / "old")
    assert error_of(tmp_path, jsonl_source(tmp_path / "set" / "a.jsonl")).endswith("is neither a file nor a folder")


NAMES = [
    "web[1]",
    "[a-b]",
    "what?",
    "a#b",
    "100%25",
    "-rf",
    "space ",
    "new\nline",
    "back\\slash",
    "~",
    "*",
    "\udcff",
    "{x}",
]


@pytest.mark.parametrize("name", NAMES)
def test_files_of_every_name(tmp_path: Path, name: str) -> None:
    texts = documents(30)
    write_jsonl(tmp_path / "set" / f"{name}.jsonl", texts[:20])
    write_jsonl(tmp_path / "set" / name / "x.jsonl", texts[20:])
    assert sorted(read_texts(prepare_one(tmp_path, jsonl_source(tmp_path / "set")))) == sorted(texts)


@pytest.mark.parametrize("name", ["web[1]", "[a-b]", "what?"])
def test_a_name_that_is_there_is_no_glob(tmp_path: Path, name: str) -> None:
    texts = documents(40)
    write_jsonl(tmp_path / f"{name}.jsonl", texts[:20])
    write_jsonl(tmp_path / name / "x.jsonl", texts[20:30])
    for other in ("web1", "a", "whatX"):
        write_jsonl(tmp_path / f"{other}.jsonl", texts[30:])
    paths = (tmp_path / f"{name}.jsonl", f"{tmp_path / name}/*.jsonl")
    assert read_texts(prepare_one(tmp_path, jsonl_source(*paths))) == sorted(texts[:30], key=texts.index)


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("c4-train.00000-of-01024.json.gz", gzip.compress),
        ("UP.JSONL.GZ", gzip.compress),
        ("x.ndjson", bytes),
        ("x.jsonl.bz2", bz2.compress),
        ("x.JsonL.Xz", lzma.compress),
        ("v1_7.json.zst", zstandard.compress),
        ("pzstd.jsonl.zst", lambda data: b"\x50\x2a\x4d\x18\x04\0\0\0size" + zstandard.compress(data)),
    ],
)
def test_names_that_others_give_such_files(tmp_path: Path, name: str, pack: Any) -> None:
    texts = documents(20)
    (tmp_path / "set").mkdir()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "set" / name).write_bytes(pack(rows.encode()))
    assert read_texts(prepare_one(tmp_path, jsonl_source(tmp_path / "set"))) == texts


def test_json_counts_only_where_there_is_no_jsonl(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "set" / "x.jsonl", documents(10))
    (tmp_path / "set" / "dataset_info.json").write_text('{\n "text": "facts"\n}')
    train = prepare_one(tmp_path, jsonl_source(tmp_path / "set"))
    assert read_texts(train) == documents(10)
    assert manifest_of(train).skipped["files"] == {"*.json": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.lz4", b"x", r".lz4 files are not read here: unpack it, or pack it as .gz, .bz2, .xz, .zst"),
        ("a.jsonl.zip", b"x", r".zip files are not read here: unpack it, or pack it as .gz, .bz2, .xz, .zst"),
        ("a.jsonl.br", b"x", r".br files are not read here: unpack it, or pack it as .gz, .bz2, .xz, .zst"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "holds .gz data, which its name does not say: give it a name that ends in .gz"),
        ("a.jsonl.gz", b'{"text": "a"}', "is no .gz file, whatever its name says: rename it, or fetch it again"),
        ("a.jsonl.xz", bz2.compress(b"{}"), "holds .bz2 data, which its name does not say: give it a name that ends in .bz2"),
        ("a.jsonl", b"PK\x03\x04...", "holds .zip data, which its name does not say: convert it"),
    ],
)  # fmt: skip
def test_compressions_that_are_not_known_or_not_said(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_jsonl(tmp_path / "set" / "good.jsonl", documents(10))
    (tmp_path / "set" / name).write_bytes(content)
    for path in (tmp_path / "set", tmp_path / "set" / name):
        assert error_of(tmp_path, jsonl_source(path)).endswith(
            f"streams.s.source.paths: {tmp_path / 'set' / name}: {message}"
        )
    train = prepare_one(tmp_path, jsonl_source(tmp_path / "set"), on_error="skip")
    assert read_texts(train) == documents(10)
    assert sum(manifest_of(train).skipped["files"].values()) == 1


def test_a_folder_of_other_files_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("a.parquet", "b.parquet", "c.csv", ".d"):
        (tmp_path / "set" / name).write_text("x")
    message = error_of(tmp_path, jsonl_source(tmp_path / "set"))
    holds = "holds no *.jsonl, *.ndjson, *.json, but 2 *.parquet, 1 hidden file, 1 *.csv"
    assert message.endswith(f"streams.s.source.paths: {str(tmp_path / 'set')!r} {holds}")
    assert error_of(tmp_path, jsonl_source("")).startswith(
        f"{tmp_path}/prepare.yaml: streams.s.source.paths: nothing matches ''"
    )


def test_code_counts_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in {
        "a.py": b"print(1)",
        "B.PY": b"print(2)",
        "c.py": b"\xff\xfe",
        "d.py": b"nul \0",
        "e.py": b"#" * 2000,
        "f.csv": b"1,2",
        "build/g.py": b"x",
    }.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(content)
    train = prepare_one(tmp_path, {"name": "code", "paths": [str(tmp_path / "set")], "max_file_bytes": 1000})
    assert sorted(read_texts(train)) == ["print(1)", "print(2)"]
    assert manifest_of(train).read == {"files": 4, "documents": 2}
    assert manifest_of(train).skipped == {
        "files": {"*.csv": 1, "ignored folder": 1, "over max_file_bytes": 1},
        "documents": {"NUL bytes": 1, "not UTF-8": 1},
    }
    assert (
        "s: read 2 documents from 4 files; skipped: 1 *.csv, 1 ignored folder, 1 over max_file_bytes, "
        "1 NUL bytes, 1 not UTF-8\n"
    ) in capsys.readouterr().err


def test_home_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_jsonl(tmp_path / "home" / "set" / "x.jsonl", documents(20))
    monkeypatch.chdir(tmp_path)
    train = prepare_one(tmp_path, jsonl_source("~/set/*.jsonl"), output="~/ds")
    assert train == tmp_path / "home" / "ds" / "s" / "train"
    assert read_texts(train) == documents(20)
    assert not (tmp_path / "~").exists()
    tokenizer = {"name": "load", "path": "~/ds/tokenizer"}
    assert read_texts(prepare_one(tmp_path, jsonl_source("~/set"), tokenizer=tokenizer)) == documents(20)
    message = error_of(tmp_path, jsonl_source("~/set"), output="s3://bucket/ds")
    assert message.endswith("output: prepare writes to a local folder, got 's3://bucket/ds': upload it from there")
