"""Runs of a sweep that have begun stay what their arms say, also in what a run by itself takes otherwise."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.feed.loader import open_streams
from flexbert_core.schema import ConfigError
from sweeps.arms import Design, expand
from sweeps.file import load_sweep_file
from sweeps.folder import cells_of
from tests.helpers.tiny import ROW, ROWS, write_config
from training.checkpoints.files import Snapshot, write_checkpoint
from training.folder import RunFolder

GROWN = {"name": "grow", "from": "small", "method": "tile_center"}
ARMS: dict[str, Any] = {"rows": {"trainer.microbatch_size": 4}, "grown": {"model.init": GROWN}}


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def design(folder: Path, /, arms: dict[str, Any] = ARMS, **node: Any) -> Design:
    base = folder / "base/train.yaml"
    if not base.exists():
        write_config(folder / "base", folder / "data", 2, "full")
    file = folder / "tiny.yaml"
    file.write_text(json.dumps({"base": str(base), "folder": str(folder / "s"), "seeds": [0], "list": arms, **node}))
    return expand(file, load_sweep_file(file))


def begin(design: Design, *, saved: bool = True) -> None:
    """The runs of a sweep as they are after a step."""
    for cell in cells_of(design):
        folder = RunFolder(cell.config.folder)
        folder.open(cell.config)
        folder.close()
        data, held_out = (
            dict(zip(cell.config.data.streams, (each.fingerprint for each in streams), strict=True))
            for streams in (open_streams(cell.config.data, split) for split in ("train", "validation"))
        )
        if saved:
            state = {"data": data, "validation_data": held_out}
            write_checkpoint(folder.checkpoints / f"tokens-{ROWS * ROW}", Snapshot({}, {}, {}), state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {**ARMS, "rows": {"trainer.microbatch_size": 2}}}, r"rows, .*trainer\.microbatch_size was 4, now 2: undo"),
        ({"arms": {**ARMS, "grown": {"model.init": {**GROWN, "from": "other"}}}}, r"model\.init\.from was 'small', now 'other'"),
        ({"branch_from": "runs/other"}, r"from\.checkpoint was 'runs/stable', now 'runs/other'"),
        ({"set": ["trainer.spike_guard={}"]}, r"trainer\.spike_guard was None"),
        ({"evaluations": [{"name": "held_out_documents", "max_seq_len": 16}]}, "held_out_documents was .*32.*, now .*16"),
    ],
)  # fmt: skip
def test_what_an_arm_is_may_not_change(data: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    begun: dict[str, Any] = {"branch_from": "runs/stable"} if "branch_from" in changes else {}
    begin(design(tmp_path, **begun))
    with pytest.raises(ConfigError, match=message) as error:
        cells_of(design(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_what_no_arm_says_and_only_speed_depends_on_may_change(data: Path, tmp_path: Path) -> None:
    arms = {"deep": {"model.num_hidden_layers": 4}}
    begin(design(tmp_path, arms))
    said = ["trainer.microbatch_size=2", "trainer.hang_timeout=99", "checkpoint.keep=3", "loggers=[]", "data.lanes=4"]
    cells_of(design(tmp_path, arms, set=said))


def test_a_run_without_a_checkpoint_begins_anew(data: Path, tmp_path: Path) -> None:
    """As after a start whose `from` was not there."""
    begin(design(tmp_path, branch_from="runs/stabel"), saved=False)
    cells_of(design(tmp_path, branch_from="runs/stable"))


def test_moved_data_are_known_and_others_refused(data: Path, tmp_path: Path) -> None:
    begin(design(tmp_path))
    shutil.copytree(data, tmp_path / "moved")
    cells_of(design(tmp_path, set=[f"data.streams.full.path={tmp_path}/moved/full"]))
    with pytest.raises(ConfigError, match=r"data\.streams\.full\.path was .*data/full', now .*moved/sparse'"):
        cells_of(design(tmp_path, set=[f"data.streams.full.path={tmp_path}/moved/sparse"]))
