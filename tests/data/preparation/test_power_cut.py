"""What tasks write is on the disk before they are done; what a power cut has taken is made anew."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.preparation.documents import load_arrays, load_tasks, numbered, save_array, save_arrays
from flexbert_core.schema import RunError
from tests.helpers.preparing import config_file, documents, files, interrupt, run, write_jsonl


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = documents(120)
    write_jsonl(folder / "a" / "1.jsonl", texts[:50])
    write_jsonl(folder / "a" / "2.jsonl", texts[50:80])
    write_jsonl(folder / "b" / "1.jsonl", texts[80:])
    return folder


@pytest.fixture(scope="module")
def prepared(corpus: Path) -> Path:
    return run(config_file(corpus))


@pytest.mark.parametrize(
    "name",
    [
        "scan/00000.npz",
        pytest.param("scan/00001.sorted.npy", marks=pytest.mark.slow),
        pytest.param("scan/00000.order.npy", marks=pytest.mark.slow),
        pytest.param("plan/00001.npz", marks=pytest.mark.slow),
    ],
)
def test_what_a_power_cut_has_left_empty_is_made_anew(
    corpus: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path, output = config_file(corpus), f"output={tmp_path / 'out'}"
    interrupt(path, monkeypatch, output)
    work = tmp_path / "out" / ".work"
    if name.startswith("scan"):  # of which the plan is made
        for file in (work / "plan").iterdir():
            file.unlink()
    (work / name).write_bytes(b"")
    with pytest.raises(RunError, match=rf"{name}: damaged or missing .*: run the same command again, which makes it"):
        run(path, output)
    assert files(run(path, output)) == files(prepared)


def test_tokens_of_a_task_that_a_power_cut_has_taken_are_made_anew(
    corpus: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = config_file(corpus), f"output={tmp_path / 'out'}"

    def cut(config: Any, output: Path, plans: Any) -> None:
        (output / ".work" / "done" / "00001.npz").write_bytes(b"")

    with monkeypatch.context() as patch:
        patch.setattr("data.preparation.dataset.check_tokens", cut)
        with pytest.raises(RunError, match=r"done/00001\.npz: damaged or missing"):
            run(path, output)
    parts = {part: part.stat().st_ino for part in (tmp_path / "out").glob("*/*/part-*")}
    assert files(run(path, output)) == files(prepared)
    assert {part: part.stat().st_ino for part in (tmp_path / "out").glob("*/*/part-*")} == parts  # none was away


def test_arrays_are_on_the_disk_before_they_have_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, really = [], os.fsync

    def fsync(handle: int) -> None:
        synced.append((os.fstat(handle).st_ino, (tmp_path / "a.npy").exists(), (tmp_path / "b.npz").exists()))
        really(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    save_array(tmp_path / "a.npy", np.arange(9))
    save_arrays(tmp_path / "b.npz", x=np.arange(9))
    assert ((tmp_path / "a.npy").stat().st_ino, False, False) in synced
    assert ((tmp_path / "b.npz").stat().st_ino, True, False) in synced
    assert load_arrays(tmp_path / "b.npz", tmp_path / "none")["x"].tolist() == list(range(9))


def test_tasks_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """As texts, 100000 comes before 99999."""
    (tmp_path / "tasks").mkdir()
    for rank in (100_000, 99_999, 7):
        numbered(tmp_path / "tasks", rank, ".json").write_text(f'{{"rank": {rank}}}')
    assert [task["rank"] for task in load_tasks(tmp_path)] == [7, 99_999, 100_000]
