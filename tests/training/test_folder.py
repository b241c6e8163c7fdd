"""What a run finds in its folder when it comes back: no checkpoint yet, none any more, a damaged summary."""

import json
import shutil
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.ranks import Ranks
from tests.helpers.tiny import write_config


def error_of(ranks: Ranks, *arguments: str) -> str:
    """The one line of a command that is refused, exit code 2."""
    codes, text = ranks.run(1, *arguments)
    assert codes == [2], text
    (line,) = text.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_gone_does_not_start_over(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    file, run = str(write_config(tmp_path, tiny_data, 3)), tmp_path / "run"
    ranks.train(1, file)
    (run / "summary.json").unlink()
    metrics = (run / "metrics.jsonl").read_bytes()
    (run / "checkpoints").rename(tmp_path / "kept")
    for _ in range(2):  # without the folder, and with an empty one
        line = error_of(ranks, "train", file)
        assert line == (
            f"error: {run}/checkpoints: its checkpoints are gone: restore them, or remove {run} to start over, or give "
            "the run another name"
        )
        assert (run / "metrics.jsonl").read_bytes() == metrics
        assert "checkpoints gone" in ranks.run(1, "status", str(run))[1]
        assert not list((run / "checkpoints").glob("*"))
        (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints").rmdir()
    (tmp_path / "kept").rename(run / "checkpoints")
    (run / "first_checkpoint.json").unlink()  # as when a kill came before it, or of a run older than it
    assert "resuming after step 3" in ranks.train(1, file)
    assert (run / "first_checkpoint.json").exists()
    shutil.rmtree(run)
    assert "starting, 3 steps" in ranks.train(1, file)


def test_a_run_killed_before_its_first_checkpoint_starts_again_by_itself(
    ranks: Ranks, tiny_data: Path, tmp_path: Path
) -> None:
    file, run = str(write_config(tmp_path, tiny_data, 60, checkpoint={"interval": "1B"})), tmp_path / "run"
    metrics = run / "metrics.jsonl"

    def kill() -> None:
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            time.sleep(0.01)
        for child in psutil.Process(ranks.pid).children():
            child.kill()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    assert ranks.run(1, "train", file)[0] == [-9]
    thread.join()
    assert not list((run / "checkpoints").glob("*"))
    text = ranks.train(1, file)
    assert f"STARTING AGAIN AT STEP 0: {run} had trained " in text
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 61))
    assert json.loads((run / "first_checkpoint.json").read_text()) == {"checkpoint": f"tokens-{60 * 8 * 32}"}


def test_a_damaged_summary_is_one_line(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    file, run = str(write_config(tmp_path, tiny_data, 1)), tmp_path / "run"
    ranks.train(1, file)
    summary = json.loads((run / "summary.json").read_text())
    for content in (b"", b'{"steps": 3, "tok', b"\xff\x00", b'{"steps": 3}', b"[]"):
        (run / "summary.json").write_bytes(content)
        for arguments in (["status", str(run)], ["train", file]):
            assert error_of(ranks, *arguments) == (
                f"error: {run}/summary.json: damaged: remove it, then `train` writes it again from the last checkpoint"
            )
    (run / "summary.json").unlink()
    ranks.train(1, file)
    again = json.loads((run / "summary.json").read_text())
    for key in ("steps", "tokens", "validation", "stream_tokens", "export"):
        assert again[key] == summary[key]
