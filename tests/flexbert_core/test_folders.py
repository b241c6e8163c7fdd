"""A folder of another kind than a command wants is named, and nothing is advised that does not help."""

from collections.abc import Callable
from pathlib import Path

import pytest

from commands.average import average
from data.inspect import inspect
from evals.models import resolve
from flexbert_core.schema import ConfigError, plain_console
from sweeps.report.subject import read_subject
from training.checkpoint_source import read_source
from training.folder import RunFolder

FILES = {
    "run": ["config.yaml"],
    "sweep": ["sweep.json"],
    "run/checkpoints/tokens-5": ["manifest.json", "state.json"],
    "export": ["config.json"],
    "dataset": ["prepare.json", "prose/train/stream.json"],
    "runs": ["one/config.yaml"],
    "empty": [],
}
COMMANDS: dict[str, Callable[[Path], object]] = {
    "inspect": inspect,
    "run": lambda path: RunFolder(path).recorded_config(),
    "report": lambda path: read_subject([path]),
    "model": lambda path: resolve([str(path)], Path("scratch")),
    "average": lambda path: average([path, Path("empty")], Path("out"), None, None, None, plain_console()),
    "checkpoint": read_source,
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for folder, names in FILES.items():
        for file in (Path(folder) / name for name in names):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}")
        Path(folder).mkdir(exist_ok=True)
    return tmp_path


def said_of(folder: str, command: str) -> str:
    with pytest.raises(ConfigError) as caught:
        COMMANDS[command](Path(folder))
    return str(caught.value)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("folder", "command", "said"),
    [
        ("run", "inspect", "run: this is a run: give --step N to see what a step trained on"),
        ("export", "inspect", "export: this is a model, no dataset: give what `python main.py prepare` wrote"),
        ("empty", "inspect", "empty: holds no stream.json: run `python main.py prepare CONFIG` to make"),
        ("dataset", "run", "dataset: this is a dataset, no run folder: give runs/NAME"),
        ("runs", "run", "runs: this is a folder of runs: give one, such as runs/one"),
        (
            "run/checkpoints/tokens-5",
            "run",
            "run/checkpoints/tokens-5: this is a checkpoint, no run folder: give its run, run",
        ),
        ("empty", "run", "empty: no run folder (it holds no config.yaml): give runs/NAME"),
        ("dataset", "report", "dataset: this is a dataset, no sweep and no run: give the folder that"),
        ("empty", "report", "empty: no sweep (it holds no sweep.json) and no run: give the folder that"),
        ("dataset", "model", "dataset: this is a dataset, no model: give a run, a checkpoint, an export or"),
        ("sweep", "model", "sweep: this is a sweep, no model: give a run, a checkpoint, an export or"),
        ("empty", "model", "empty: has no config.json, and is no run or checkpoint: give a run"),
        ("dataset", "average", "dataset: this is a dataset, no checkpoint: give runs/NAME/checkpoints/tokens-N"),
        ("export", "checkpoint", "export: this is a model, no checkpoint: give runs/NAME/checkpoints/tokens-N"),
    ],
)
def test_a_folder_of_another_kind_is_named(folder: str, command: str, said: str) -> None:
    assert said_of(folder, command).startswith(said)


@pytest.mark.usefixtures("root")
def test_a_run_without_a_checkpoint_is_still_a_run() -> None:
    assert said_of("runs/one", "model") == "runs/one: has no checkpoint yet"
