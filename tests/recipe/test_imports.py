"""Components from a user's own file, from the command line: every process runs the file before the config is checked."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from flexbert.registry import SLOTS
from flexbert_core.schema import ConfigError
from recipe.config import load_run_config, read_recorded_config
from recipe.imports import import_components
from tests.helpers.registries import registries_as_before
from tests.helpers.runs import command, launched, run
from tests.helpers.synthetic_runs import RUN, write_dataset

MINE = """
import torch
from pydantic import Field
from torch import nn

from flexbert import register
from flexbert_core.schema import Component


@register("norm", "NAME_norm")
class MyNorm(nn.Module):
    class Config(Component):
        start: float = Field(1.0, gt=0)

    def __init__(self, config, *, hidden_size):
        super().__init__()
        self.scale = nn.Parameter(torch.full((hidden_size,), config.start))

    def forward(self, states):
        return states * self.scale / states.abs().mean(-1, keepdim=True).clamp_min(1e-3)


@register("mlp", "NAME_mlp")
class MyMlp(nn.Module):
    class Config(Component):
        pass

    def __init__(self, config, *, hidden_size, intermediate_size):
        super().__init__()
        self.first = nn.Linear(hidden_size, intermediate_size)
        self.second = nn.Linear(intermediate_size, hidden_size)

    def forward(self, states):
        return self.second(self.first(states).relu())
"""


def run_file(folder: Path, dataset: Path, name: str, source: str, imports: Any = None, **model: Any) -> Path:
    """A run file in a folder of its own, with the user's file beside it."""
    folder = folder / name
    folder.mkdir()
    (folder / "mine.py").write_text(source.replace("NAME", name))
    data = {"tokenizer": str(dataset / "tokenizer"), "streams": {"words": {"path": str(dataset / "words")}}}
    node = {
        **RUN,
        "name": name,
        "imports": ["mine.py"] if imports is None else imports,
        "runs": str(folder / "runs"),
        "data": {**data, "num_workers": 0},
        "model": {**RUN["model"], **model},
    }
    (folder / "run.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(node)))
    return folder / "run.yaml"


@pytest.fixture(autouse=True)
def _registries_as_before() -> Iterator[None]:
    """The tests' files register the same names."""
    with registries_as_before():
        yield


@pytest.mark.slow
def test_a_norm_and_an_mlp_from_a_users_file_train_on_two_processes(tmp_path: Path) -> None:
    slots: dict[str, Any] = {"norm": "mine_norm", "mlp": "mine_mlp"}
    file = run_file(tmp_path, write_dataset(tmp_path / "data"), "mine", MINE, **slots)
    done = run(launched(2, "train", str(file)))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "mine" / "runs" / "mine"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 16
    assert min(losses) < losses[0]
    recorded = OmegaConf.load(folder / "config.yaml")
    assert recorded.imports == [str((tmp_path / "mine" / "mine.py").resolve())]
    assert recorded.model.norm == {"name": "mine_norm", "start": 1.0}
    # The export carries the file
    export = Path(json.loads((folder / "summary.json").read_text())["export"])
    assert (export / "mine.py").read_text() == MINE.replace("NAME", "mine")
    assert [path.name for path in (folder / "exports").iterdir()] == [export.name]
    assert list((folder / "checkpoints").iterdir())
    # The same command, from another folder, reads the recorded config and finds nothing to do; replay needs it too
    for arguments in (("train", str(file)), ("inspect", str(folder), "--step", "3")):
        done = run(command(*arguments))
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_file_that_fails_ends_the_command_with_one_line(tmp_path: Path) -> None:
    file = run_file(tmp_path, tmp_path, "failing", "import json\n\nraise KeyError('no such thing')\n")
    done = run(command("train", str(file)))
    assert done.returncode == 2
    fault = f"{file}: imports[0]: {file.parent / 'mine.py'}:3: KeyError: 'no such thing'"
    assert done.stderr.strip().splitlines() == [f"error: {fault}"]


CASES: list[tuple[str, Any, str]] = [
    ("", ["absent.py"], r"imports\[0\]: .*/absent\.py: no such file; relative paths start at the run file"),
    ("", ["mine.py", "mine.txt"], r"imports\[1\]: .*/mine\.txt: no such file"),
    ("", ["run.yaml"], r"imports\[0\]: .*/run\.yaml: is no Python file"),
    ("", ["a" * 5000 + ".py"], r"imports\[0\]: 'a"),
    ("", ["a\0b.py"], r"imports\[0\]: "),
    ("", "mine.py", r"imports: should be a valid list, got 'mine\.py'"),
    ("", [7], r"imports\[0\]: should be a valid string, got 7"),
    ("x = 1\ndef f(:\n", None, r"imports\[0\]: .*/mine\.py:2: SyntaxError: invalid syntax"),
    ("import nothing_of_this_name\n", None, r"mine\.py:1: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
    ("\nimport sys\nsys.exit(3)\n", None, r"mine\.py:3: SystemExit: 3"),
    (MINE.replace("NAME_norm", "layernorm"), None, r"mine\.py:1\d: ValueError: norm 'layernorm' is registered twice"),
]


@pytest.mark.parametrize(("source", "imports", "message"), CASES, ids=[message[:50] for *_, message in CASES])
def test_what_cannot_be_imported_is_one_line(tmp_path: Path, source: str, imports: Any, message: str) -> None:
    file = run_file(tmp_path, tmp_path, "bad", source, imports)
    with pytest.raises(ConfigError, match=message) as caught:
        load_run_config(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_a_file_runs_once_and_the_resolved_config_finds_it_from_anywhere(tmp_path: Path) -> None:
    file = run_file(tmp_path, tmp_path, "once", MINE, norm="once_norm", mlp="once_mlp")
    config = load_run_config(file)
    assert config.imports == [str((tmp_path / "once" / "mine.py").resolve())]
    assert load_run_config(file) == config
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))
    assert read_recorded_config(elsewhere) == config
    other = run_file(tmp_path, tmp_path, "two", MINE, norm="two_norm")  # another file of the same name
    assert load_run_config(other).model.norm.name == "two_norm"
    unknown = run_file(tmp_path, tmp_path, "typo", MINE, norm="typo_nrm")
    with pytest.raises(
        ConfigError,
        match=r"model\.norm: unknown norm 'typo_nrm', did you mean 'typo_norm'\?; a part of yours needs its file in imports$",
    ):
        load_run_config(unknown)


def test_a_file_imports_what_lies_beside_it(tmp_path: Path) -> None:
    """As when it is run as a script; a file of the name of ours hides nothing."""
    (tmp_path / "beside_mine.py").write_text("FACTOR = 3.0\n")
    (tmp_path / "ranks.py").write_text("raise RuntimeError('hides ours')\n")
    source = "from beside_mine import FACTOR\nfrom ranks import rank\n" + MINE.replace("1.0, gt=0", "FACTOR, gt=0")
    (tmp_path / "mine.py").write_text(source.replace("NAME", "besides"))
    import_components({"imports": ["mine.py"]}, tmp_path / "run.yaml")
    assert SLOTS["norm"].parse("besides_norm").model_dump() == {"name": "besides_norm", "start": 3.0}
