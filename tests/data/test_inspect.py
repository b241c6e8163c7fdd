"""What inspect prints is what is there; what is no dataset is said in one line."""

import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
from rich.console import Console

from data.inspect import inspect, shown_documents
from data.store.shards import open_stream
from flexbert_core.schema import ConfigError, RunError
from tests.helpers.preparing import config_file, documents, run, shown, write_jsonl
from tests.helpers.users import as_nobody


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write_jsonl(folder / "a" / "1.jsonl", [*documents(60), documents(1)[0]])
    write_jsonl(folder / "b" / "1.jsonl", documents(60, first=60))
    return run(config_file(folder))


@pytest.fixture
def dataset(prepared: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return shutil.copytree(prepared, tmp_path / "dataset")


def test_whole_dataset(dataset: Path) -> None:
    text = shown(dataset)
    for name in ("a", "b"):
        for split in ("train", "validation"):
            manifest = open_stream(dataset / name / split).manifest
            assert f"{name}/{split}" in text
            assert f"{manifest.tokens:,}" in text
            for edge, count in manifest.length_histogram.items():
                assert any(
                    line.split()[:1] == [f"{int(edge):,}+"] and line.endswith(f" {count:,}")
                    for line in text.splitlines()
                )
    assert text.count("good") == 4
    assert f"384 ids (uint16), {dataset / 'tokenizer'}" in text
    assert shown(dataset) == text


def test_samples_are_decoded_documents(dataset: Path) -> None:
    text = shown(dataset / "a" / "train", samples=1)
    assert text.count("document ") == 1
    body = text.partition("document ")[2].splitlines()[1].strip("\u2502 ")
    assert any(document.startswith(body) for document in documents(60))
    assert "document " not in shown(dataset / "a" / "train", samples=0)


def test_one_stream(dataset: Path) -> None:
    text = shown(dataset / "a")
    assert "a/train" in text
    assert "a/validation" in text
    assert "b/train" not in text


@pytest.mark.parametrize("samples", [0, 3])
def test_damage_is_found_and_the_rest_is_shown(dataset: Path, samples: int, capsys: pytest.CaptureFixture[str]) -> None:
    stream = open_stream(dataset / "a" / "train")
    for shard in stream.manifest.shards:
        file = Path(stream.path) / shard.file
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    names = ["token_counts.npy", "index.json"]
    for name in names:
        (Path(stream.path) / name).unlink()
    names += [shard.file for shard in stream.manifest.shards]
    with pytest.raises(RunError) as caught:
        inspect(dataset, samples, Console(width=10_000))
    some = f"{', '.join(names[:3])} and {len(names) - 3} more"
    fix = "restore it, or delete the stream's folder and run prepare again"
    assert str(caught.value) == f"{dataset}: damaged: a/train: {some}: {fix}"
    text = capsys.readouterr().out
    assert f"damaged: {', '.join(names)}" in text
    assert text.count("documents by length in tokens") == 4
    assert text.count(" document ") >= samples * 3  # those of the other splits


def test_shards_are_checked_in_little_memory(dataset: Path) -> None:
    stream = open_stream(dataset / "a" / "train")
    file = Path(stream.path) / stream.manifest.shards[0].file
    os.truncate(file, 2**26)
    tracemalloc.start()
    try:
        with pytest.raises(RunError, match=str(file.relative_to(stream.path))):
            inspect(dataset / "a" / "train", 0, Console())
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_documents_are_drawn_without_a_list_of_all() -> None:
    chosen = shown_documents(10**12, 3)
    assert chosen == shown_documents(10**12, 3) == sorted(set(chosen))
    assert chosen[-1] > 10**9
    assert shown_documents(2, 3) == [0, 1]


@pytest.mark.parametrize("name", ["chunks.npy", "token_counts.npy", "index.json"])
@pytest.mark.parametrize("content", [None, b"", b"garbage"])
def test_damage_beside_the_shards_is_found(dataset: Path, name: str, content: bytes | None) -> None:
    file = dataset / "a" / "train" / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RunError, match=rf": damaged: a/train: {name}: restore"):
        shown(dataset, samples=0)


def test_a_tokenizer_without_roles_is_enough(dataset: Path) -> None:
    """Training needs no more of it than its fingerprint."""
    for file in (dataset / "tokenizer").iterdir():
        if file.name != "tokenizer.json":
            file.unlink()
    assert f"384 ids (uint16), {dataset / 'tokenizer'}\n" in shown(dataset)
    (dataset / "tokenizer" / "tokenizer.json").unlink()
    assert "tokenizer.json: No such file" in shown(dataset)


@pytest.mark.parametrize("below", ["", "b", "b/train"])
def test_a_split_without_its_manifest_is_unfinished(dataset: Path, below: str) -> None:
    (dataset / "b" / "train" / "stream.json").unlink()
    with pytest.raises(ConfigError, match=r"b/train: not finished|b/train: holds no stream.json"):
        shown(dataset / below)


@pytest.mark.parametrize("locked", ["", "b", "b/train", "b/train/stream.json"])
def test_what_this_user_may_not_read(prepared: Path, open_folder: Path, locked: str) -> None:
    dataset = shutil.copytree(prepared, open_folder / "dataset")
    (dataset / locked).chmod(0)
    with as_nobody(), pytest.raises(ConfigError, match=rf"{locked}: Permission denied: give this user the right"):
        inspect(dataset)


def test_what_is_no_dataset(prepared: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: no such folder: give a dataset that"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"a: holds no stream\.json: run `python main\.py prepare CONFIG`"):
        inspect(prepared.parent / "a")
    (dataset / "b" / "train" / "stream.json").unlink()
    with pytest.raises(ConfigError, match=r"b/train: not finished: run `python main\.py prepare CONFIG` again"):
        inspect(dataset)
