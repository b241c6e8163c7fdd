"""A file of another kind is recognised, and said to be one in one line."""

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from data.preparation.config import load_prepare_config
from evals.config import load_eval_file
from flexbert.config import FlexBertConfig
from flexbert_core.schema import ConfigError
from recipe.config import load_run_config
from recipe.track import load_track
from sweeps.file import load_sweep_file
from tests.helpers.process import ROOT, command
from tests.helpers.runs import run

LOAD: dict[str, Callable[[Path], Any]] = {
    "run": load_run_config,
    "prepare": load_prepare_config,
    "sweep": load_sweep_file,
    "eval": load_eval_file,
    "model": FlexBertConfig.from_yaml,
    "track": load_track,
}
FILES = {
    "run": "demo.yaml",
    "prepare": "data/demo.yaml",
    "sweep": "sweep/activation.yaml",
    "eval": "eval/sts.yaml",
    "model": "model/modernbert-base.yaml",
    "track": "speedrun/track-cpu.yaml",
}
SAID = {
    "run": "this is a run file: `main.py train {file}` reads it",
    "prepare": "this is a prepare file: `main.py prepare {file}` reads it",
    "sweep": "this is a sweep file: `main.py sweep {file}` reads it",
    "eval": "this is an eval file: `main.py eval {file} MODEL` reads it",
    "model": "this is a model file: what it says stands under `model` of a run file",
    "track": "this is a track file: `main.py speedrun verify RUN... --track {file}` reads it",
}


@pytest.mark.parametrize(("asked", "given"), list(permutations(FILES, 2)))
@pytest.mark.parametrize("first_line", [True, False])
def test_a_file_of_another_kind_is_named(asked: str, given: str, first_line: bool, tmp_path: Path) -> None:
    text = (ROOT / "configs" / FILES[given]).read_text()
    file = tmp_path / "file.yaml"
    file.write_text(text if first_line else text.split("\n", 1)[1])
    with pytest.raises(ConfigError) as caught:
        LOAD[asked](file)
    assert str(caught.value) == f"{file}: {SAID[given].format(file=file)}"


@pytest.mark.parametrize(
    ("asked", "text", "said"),
    [
        ("run", "{}", "name: is required and missing"),
        ("run", "{seed: 1}", "name: is required and missing"),
        ("run", "{foo: 1, bar: 2}", "unknown keys 'foo', 'bar', valid names: algorithms"),
        ("prepare", "{output: x, streams: {}, tokenizr: x}", "unknown key 'tokenizr', did you mean 'tokenizer'?"),
        ("eval", "{}", "evaluation: is required and missing"),
        ("eval", "{name: x}", "unknown key 'name', valid names: evaluation, executor, imports"),
    ],
)
def test_a_faulty_file_of_the_asked_kind_is_none_of_another(asked: str, text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        LOAD[asked](file)
    assert said in str(caught.value)
    assert "this is a" not in str(caught.value)


def test_valid_names_are_listed_once_for_many_unknown_keys(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("".join(f"zzz{i}: 1\n" for i in range(30)) + "evaluatoin: x\n")
    with pytest.raises(ConfigError) as caught:
        load_eval_file(file)
    assert str(caught.value) == (
        f"{file}: unknown key 'evaluatoin', did you mean 'evaluation'?; unknown keys 'zzz0', 'zzz1', 'zzz2', 'zzz3', "
        "'zzz4' and 25 more, valid names: evaluation, executor, imports"
    )


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["prepare", "configs/demo.yaml"], "run"),
        (["train", "configs/data/demo.yaml"], "prepare"),
        (["doctor", "configs/data/demo.yaml"], "prepare"),
        (["sweep", "run", "configs/demo.yaml"], "run"),
        (["eval", "configs/demo.yaml", "MODEL"], "run"),
        (["speedrun", "verify", "runs/x", "--track", "configs/demo.yaml"], "run"),
    ],
)
def test_each_command_says_it(arguments: list[str], kind: str) -> None:
    done = run(command(*arguments))
    file = next(each for each in arguments if each.startswith("configs/"))
    assert (done.returncode, done.stderr) == (2, f"error: {file}: {SAID[kind].format(file=file)}\n")
