"""An interrupted command says what the same command does."""

import ast
import errno
import os
import shutil
from pathlib import Path

import pytest
import typer

from commands import one_line
from commands.one_line import plain_errors, refused
from flexbert import build, to_hf
from flexbert_core.schema import RunError
from tests.helpers.in_process import invoke
from tests.helpers.limits import file_size_limit
from tests.helpers.models import tiny
from tests.helpers.process import ROOT
from tests.helpers.tokenizer import tokenizer_of

AGAIN = {
    "prepare": one_line.FROM_TASKS,
    "train": one_line.FROM_CHECKPOINT,
    "evaluate": one_line.FROM_CELLS,
    "follow": one_line.FROM_CELLS,
    "publish": one_line.FROM_PUSHED,
    "demo": one_line.FROM_CHECKPOINT,
    "decay": one_line.FROM_CHECKPOINT,
    "run": one_line.FROM_RUNS,  # of `sweep`
}


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143), (SystemExit(85), 85)])
def test_an_interrupted_command_says_what_the_same_command_does(
    stop: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for again, said in (
        (one_line.FROM_CELLS, f"interrupted: the same command {one_line.FROM_CELLS}\n"),
        (None, "interrupted\n"),
    ):
        with pytest.raises(typer.Exit) as caught, plain_errors(again):
            raise stop
        assert caught.value.exit_code == code
        assert capsys.readouterr().err == said


def test_only_what_trains_goes_on_from_a_checkpoint() -> None:
    found = {}
    for file in (ROOT / "main.py", *(ROOT / "commands").glob("*_app.py")):
        for function in ast.walk(ast.parse(file.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "plain_errors" and call.args:
                    found[function.name] = getattr(one_line, ast.unparse(call.args[0]))
    assert found == AGAIN


@pytest.mark.parametrize(
    ("number", "fix"),
    [(errno.ENOSPC, "make room there"), (errno.EACCES, "choose a place where you may write"), (errno.EROFS, "choose")],
)
def test_what_a_disk_refuses_is_one_line_that_names_it(
    number: int, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as caught, plain_errors():
        raise OSError(number, os.strerror(number), "/data/x")
    assert caught.value.exit_code == 1
    assert capsys.readouterr().err.startswith(f"error: /data/x: {os.strerror(number)}: {fix}")


def test_a_bug_with_files_keeps_its_traceback() -> None:
    with pytest.raises(FileNotFoundError), plain_errors():
        Path("/no/such/file").read_text()
    assert refused(shutil.Error([("a", "b", "no system's error")])) is None


def test_export_says_in_one_line_where_it_cannot_write(tmp_path: Path) -> None:
    model = tmp_path / "model"
    to_hf(build(tiny()), tokenizer_of(97), model)
    file = tmp_path / "file"
    file.write_text("no folder")
    said = invoke("export", str(model), "--output", str(file / "below"), code=1)
    assert said == f"error: {file}/below: Not a directory: {refusal(errno.ENOTDIR)}\n"
    with file_size_limit(10_000):
        said = invoke("export", str(model), "--output", str(tmp_path / "out"), code=1)
    assert said == f"error: {tmp_path}/out/model.safetensors: File too large: {refusal(errno.EFBIG)}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]
    with (
        file_size_limit(10_000),
        pytest.raises(RunError, match=f"{tmp_path}/again: .*File too large.*: make room there"),
    ):
        to_hf(build(tiny()), tokenizer_of(97), tmp_path / "again")


def refusal(number: int) -> str:
    return str(refused(OSError(number, ""))).removeprefix(": ")


def test_export_leaves_alone_what_is_there(tmp_path: Path) -> None:
    """A model of the user's own: an export of ours is a folder with a config.json, too."""
    model, theirs = tmp_path / "model", tmp_path / "theirs"
    to_hf(build(tiny()), tokenizer_of(97), model)
    shutil.copytree(model, theirs)
    (theirs / "results.csv").write_text("years of work")
    for output in (theirs, model):
        said = invoke("export", str(model), "--output", str(output), code=2)
        assert said == f"error: --output: {output}: exists: choose another folder, or remove it\n"
    assert (theirs / "results.csv").read_text() == "years of work"
