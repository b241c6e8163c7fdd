"""Run folders as the report reads them: real ones, live and dead, and damaged ones."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexbert_core.durable import lock
from flexbert_core.schema import ConfigError
from sweeps.curves import held_out
from sweeps.run_result import read_run
from tests.helpers.in_process import go
from tests.helpers.tiny import ROW, ROWS, STEPS, forget_after, write_config, write_data

TOKENS = STEPS * ROWS * ROW


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    changes = {"evaluation": {"max_rows": 4, "interval": 2 * ROWS * ROW}, "seed": 3}
    return go(write_config(folder, write_data(folder / "data"), STEPS, **changes))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_finished_run(run: Path) -> None:
    found = read_run(run)
    assert (found.arm, found.seed, found.state) == ("run", 3, "finished")
    assert found.summary == json.loads((run / "summary.json").read_text())
    assert found.config["phases"][0]["max_seq_len"] == ROW
    assert [line["step"] for line in found.lines] == list(range(1, STEPS + 1))
    assert found.documents is None
    curve = held_out(found)
    assert curve.costs["tokens"].tolist() == [512.0, 1024.0, 1536.0]
    assert curve.values[-1] == found.summary["validation"]["loss"]
    rates = [(line["slots_per_second"], line["flops_per_second"]) for line in found.lines]
    assert curve.end("hours") == pytest.approx(sum(ROWS * ROW / slots for slots, _ in rates) / 3600)
    assert curve.end("flops") == pytest.approx(sum(ROWS * ROW / slots * flops for slots, flops in rates))


def test_a_killed_run_and_one_that_lost_its_checkpoints(run: Path) -> None:
    forget_after(run.parent, 3)
    assert read_run(run, "arm", 7).state == "interrupted"
    assert (read_run(run, "arm", 7).arm, read_run(run, "arm", 7).seed) == ("arm", 7)
    shutil.rmtree(run / "checkpoints")
    assert read_run(run).state == "failed"
    (run / "first_checkpoint.json").unlink()
    (run / "metrics.jsonl").unlink()
    assert read_run(run).state == "waiting"


def test_reading_a_live_run_takes_no_lock(run: Path) -> None:
    (run / "summary.json").unlink()
    with lock(run / ".lock", run, "training this run"):
        pass  # our own lock cannot be seen from this process: tests/training/test_processes.py has two
    assert read_run(run).state == "interrupted"
    with (run / "metrics.jsonl").open("a") as out:
        out.write('{"step": 7, "tokens": 17')  # being written
    assert len(read_run(run).lines) == STEPS


def test_losses_by_document(run: Path) -> None:
    file = run / "held_out_documents.npz"
    np.savez(file, documents=np.array(["a/1", "a/2"]), sums=np.array([4.0, 2.0]), counts=np.array([2, 1]))
    found = read_run(run).documents
    assert found is not None
    assert (list(found.documents), found.loss) == (["a/1", "a/2"], 2.0)
    np.savez(file, documents=np.array(["a/1", "a/1"]), sums=np.array([4.0, 2.0]), counts=np.array([2, 1]))
    with pytest.raises(ConfigError, match="held_out_documents.npz: damaged: documents, sums and counts"):
        read_run(run)
    file.write_bytes(b"torn")
    with pytest.raises(ConfigError, match=r"held_out_documents.npz: damaged \(.*\): remove it"):
        read_run(run)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_losses_by_document_are_damaged_in_one_line_however_they_are(run: Path, write: Any) -> None:
    """Cut, or with a byte turned over, at every 50th byte: what can still be read is."""
    file, counts = run / "held_out_documents.npz", np.arange(1, 101)
    write(file, documents=np.array([f"a/{number}" for number in counts]), sums=counts * 0.7, counts=counts)
    whole, told = file.read_bytes(), 0
    for place in range(0, len(whole), 50):
        for data in (whole[:place], whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :]):
            file.write_bytes(data)
            with suppress(ConfigError):
                read_run(run)
                continue
            told += 1
    assert told > len(whole) // 50  # every cut one


def test_a_run_writes_damaged_losses_by_document_anew(tmp_path: Path) -> None:
    """A kill came behind them and before the summary, and the disk has lost their end."""
    file = write_config(tmp_path, write_data(tmp_path / "data"), 2, evaluations=["held_out_documents"])
    documents = go(file) / "held_out_documents.npz"
    forget_after(tmp_path, 1)
    before = read_run(documents.parent).documents
    documents.write_bytes(documents.read_bytes()[:-30])
    go(file)
    after = read_run(documents.parent).documents
    assert before is not None
    assert after is not None
    assert after.sums.tolist() == before.sums.tolist()


def test_what_is_no_run_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run folder"):
        read_run(tmp_path / "nothing")
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="config.yaml: damaged"):
        read_run(run)
