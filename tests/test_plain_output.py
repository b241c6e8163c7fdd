"""Paths and names of the user's are printed as they are: brackets and colons are no markup."""

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.text import Text
from typer.testing import CliRunner

import main
from tests.helpers.tiny import write_config

ROOT = Path(__file__).parent.parent
FILES = [
    ROOT / "main.py",
    *(
        file
        for room in ("flexbert", "data", "training", "callbacks", "commands")
        for file in (ROOT / room).rglob("*.py")
    ),
]


def calls(file: Path) -> list[tuple[str, ast.Call]]:
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func).rpartition(".")[2], node) for node in nodes]


def test_no_other_way_to_print() -> None:
    """Every console is schema.plain_console's; what rich reads as markup whatever the console says is not used."""
    faults = []
    for file in FILES:
        for name, call in calls(file):
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            if name in ("Console", "from_markup", "get_console") or (name == "TextColumn" and "markup" not in given):
                faults.append(f"{file.name}:{call.lineno}: {name}")
            if (
                name == "Panel"
                and isinstance(given.get("title"), ast.JoinedStr | ast.Constant)
                and file.name != "inspect.py"
            ):
                faults.append(f"{file.name}:{call.lineno}: a Panel's title")
            if any(
                isinstance(node := given.get(key), ast.Constant) and node.value is not False
                for key in ("markup", "emoji")
            ):
                faults.append(f"{file.name}:{call.lineno}: {name}(markup)")
    assert faults == []


def invoke(*arguments: str, code: int | None = 0) -> str:
    """What a command prints, less the line ends that a table's cells are wrapped at."""
    done = CliRunner().invoke(main.app, list(arguments), env={"COLUMNS": "10000"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    assert code is None or done.exit_code == code, done.output
    return done.output


@pytest.mark.parametrize("odd", ["[/v2]", "[v2] :bug:"])
def test_every_command_prints_odd_folders_as_they_are(odd: str, tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "in" / odd
    shutil.copytree(tiny_data, data)
    file = write_config(tmp_path / "out" / odd, data, 2)
    run, config = tmp_path / "out" / odd / "run", str(file)
    assert f"{run}" in invoke("train", config, "--dry-run")
    text = invoke("train", config)
    assert f"{run}: starting, 2 steps" in text
    assert str(run / "checkpoints") in text
    assert f"{run}: this run is finished" in invoke("train", config)
    assert str(run) in invoke("status", str(run))
    assert json.loads(invoke("status", str(run), "--json"))["run"] == str(run)
    assert f"{run}, step 1 (" in invoke("inspect", str(run), "--step", "1")
    assert str(data) in invoke("inspect", str(data))
    assert str(run / "curves.png") in invoke("report", str(run))
    output = tmp_path / odd
    assert f"{output}: the average of " in invoke("average", str(run), "--last", "2", "--output", str(output))
    assert str(run) in invoke("doctor", config, code=None)
    assert str(run) in invoke("launch", "slurm", config, "--print", "--gpus-per-node", "1").replace("'", "")
    prepare = tmp_path / "prepare.yaml"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"Item {i}: a lamp."}) + "\n" for i in range(30)))
    prepare.write_text(
        json.dumps(
            {
                "output": str(tmp_path / "datasets" / odd),
                "tokenizer": {"name": "train", "vocab_size": 320},
                "validation_fraction": 0.2,
                "streams": {"s": {"source": {"name": "jsonl", "paths": [str(tmp_path / "a.jsonl")]}}},
            }
        )
    )
    for state in ("prepared in", "already prepared"):
        assert f"{tmp_path / 'datasets' / odd}: {state}" in invoke("prepare", str(prepare))


def commands_of(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    yield name, command
    for key, each in getattr(command, "commands", {}).items():
        yield from commands_of(each, f"{name} {key}")


def test_help_shows_its_brackets() -> None:
    """Typer gives help to rich as markup, which eats what looks like a tag: `[results]`, but not `[8]`."""
    found = list(commands_of(typer.main.get_command(main.app), "main.py"))
    assert len(found) > 20
    for name, command in found:
        for text in (command.help, *(getattr(each, "help", None) for each in command.params)):
            assert text is None or Text.from_markup(text).plain == text, (name, text)
