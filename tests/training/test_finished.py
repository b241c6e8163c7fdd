"""The command of a finished run, given again: it makes up for what is missing, and else does nothing."""

import shutil
from pathlib import Path

import pytest
from rich.console import Console

from flexbert_core.schema import RunError
from recipe.config import load_run_config
from tests.helpers.in_process import PER_STEP, go, said
from tests.helpers.ranks import Ranks
from tests.helpers.tiny import write_config
from training.trainer import train


def test_a_finished_run_copies_its_checkpoint_when_asked(tiny_data: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path, tiny_data, 2)
    run = go(file)
    assert said(file).endswith("this run is finished (2 steps); nothing to do")
    remote = tmp_path / "remote"
    line = f"tokens-{2 * PER_STEP} is copied to file://{remote}/run"
    for _ in range(2):
        assert said(file, f"checkpoint.remote=file://{remote}").endswith(f"this run is finished (2 steps); {line}")
    copied, here = (folder / f"tokens-{2 * PER_STEP}" for folder in (remote / "run", run / "checkpoints"))
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == {
        path.name: path.read_bytes() for path in here.iterdir()
    }
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RunError, match="not copied"):
        go(file, f"checkpoint.remote=file://{tmp_path}/taken", "data.download_retries=0")


def test_an_export_that_is_gone_is_written_again(
    tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_config(tmp_path, tiny_data, 2)
    run = go(file)
    export = run / "exports" / f"tokens-{2 * PER_STEP}"
    names = ("model.safetensors", "tokenizer.json", "README.md")
    before = [(export / name).read_bytes() for name in names]
    shutil.rmtree(run / "exports")
    assert "nothing to do" not in said(file)
    assert f"{export}: is gone: it is written again from the last checkpoint" in caplog.text
    assert [(export / name).read_bytes() for name in names] == before
    shutil.rmtree(run / "exports")
    shutil.rmtree(run / "checkpoints")
    assert train(load_run_config(file), Console(quiet=True))["export"] is None


def test_all_ranks_do_what_rank_0_sees_of_a_finished_run(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    """A network file system may show others an older folder: here one that has not begun."""
    file = write_config(tmp_path, tiny_data, 2, runs=f"{tmp_path}/${{oc.env:RANK,0}}")
    ranks.train(1, str(file))
    assert "this run is finished (2 steps); nothing to do" in ranks.train(2, str(file))
    assert not (tmp_path / "1").exists()
