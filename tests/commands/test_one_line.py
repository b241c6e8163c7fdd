"""An interrupted command says what the same command does."""

import ast

import pytest
import typer

from commands import one_line
from commands.one_line import plain_errors
from tests.helpers.process import ROOT

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
