"""The front door as a user meets it: real processes, exit codes, one line per mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import Ranks
from tests.helpers.synthetic import documents, write_stream

ROOT = Path(__file__).parent.parent


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_help_lists_the_commands_without_heavy_imports() -> None:
    code = (
        "import sys, json; sys.argv = ['main.py', '--help']\n"
        "import main\n"
        "try: main.app()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'composer', 'transformers', 'numpy', 'pydantic', 'omegaconf', 'datasets', 'streaming', 'numba'}\n"
        "print(json.dumps(sorted(heavy & set(sys.modules))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    *text, imported = done.stdout.splitlines()
    assert json.loads(imported) == []
    for command in ("prepare", "inspect", "train", "doctor", "status", "report", "average", "demo"):
        assert any(command in line for line in text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "configs/demo.yaml", "optimiser=adamw"], ["configs/demo.yaml: ", "'optimiser'", "did you mean 'optimizer'?"]),
        (["train", "configs/demo.yaml", "model.norm=layernrm"], ["configs/demo.yaml: model.norm: ", "did you mean 'layernorm'?"]),
        (["train", "configs/demo.yaml", "seed=abc"], ["configs/demo.yaml: seed: ", "valid integer", "'abc'"]),
        (["train", "configs/demo.yaml", "phases.0.tokens=-1M"], ["configs/demo.yaml: phases[0].tokens: ", "0 or more"]),
        (["train", "configs/demmo.yaml"], ["configs/demmo.yaml: no such file", "did you mean 'configs/demo.yaml'?"]),
        (["train", "configs/demo.yaml", "data.streams.stdlib-code.path=datasets/nope"], ["data.streams.stdlib-code.path: ", "datasets/nope", "prepare"]),
        (["train", "configs/demo.yaml", "--dry-run", "data.streams.stdlib-code.path=datasets/nope"], ["data.streams.stdlib-code.path: "]),
        (["train", "configs/demo.yaml", "phases.9.lr=3"], ["configs/demo.yaml: phases.9.lr: phases has no entry 9, only 0 to 2"]),
        (["train", "configs/demo.yaml", "phases.decay.lr=3"], ["configs/demo.yaml: phases.decay.lr: phases has no entry decay, only 0 to 2"]),
        (["prepare", "configs/nothing.yaml"], ["configs/nothing.yaml: no such file"]),
        (["eval", "speed", "x"], ["eval: 'speed': no such evaluation, valid names: beir, cosqa, ", "needle"]),
        (["inspect", "configs"], ["configs"]),
        (["inspect", "configs", "--json"], ["--json: only says something with --step"]),
        (["inspect", "configs", "--rows", "1"], ["--rows: only says something with --step"]),
        (["inspect", "runs/x", "--step", "1", "--samples", "9"], ["--samples: says nothing with --step"]),
    ],
)  # fmt: skip
def test_wrong_input_exits_2_with_one_line(
    ranks: Ranks, arguments: list[str], words: list[str], tmp_path: Path
) -> None:
    codes, text = ranks.run(1, *arguments, *([f"runs={tmp_path}"] if arguments[0] == "train" else []))
    assert codes == [2], text
    line = text.splitlines()[-1]
    assert line.startswith("error: ")
    assert text.count("\n") == 1 or "--dry-run" in arguments  # which prints the plan first
    for word in words:
        assert word in line
    assert list(tmp_path.iterdir()) == []  # a wrong config never starts


@pytest.mark.parametrize("arguments", [["train", "configs/demmo.yaml"], ["trian"]], ids=str)
def test_a_mistake_is_one_line_on_stderr_and_nothing_on_stdout(arguments: list[str]) -> None:
    """Of a process that imports everything itself, and what is imported may say something."""
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["'trian'", "'train'"]),
        (["train"], ["CONFIG"]),
        (["train", "configs/demo.yaml", "--dryrun"], ["--dryrun", "--dry-run"]),
        (["launch", "slurm", "configs/demo.yaml", "--nodes", "0"], ["--nodes", "greater than or equal to 1"]),
        (["average", "runs/x", "--output", "y", "--last", "x"], ["--last", "valid integer"]),
        (["average", "runs/x"], ["--output"]),
    ],
)
def test_wrong_usage_exits_2_with_one_line(ranks: Ranks, arguments: list[str], words: list[str]) -> None:
    codes, text = ranks.run(1, *arguments)
    assert codes == [2]
    (line,) = text.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_missing_stream_names_the_key(ranks: Ranks, tmp_path: Path) -> None:
    """With streams that exist but one: the line names that one."""
    for name in ("stdlib-code", "packages-docs"):
        for split in ("train", "validation"):
            write_stream(tmp_path / name, split, documents(0, 50, 50))
    overrides = [
        f"data.streams.{name}.path={tmp_path / name}" for name in ("stdlib-code", "packages-docs", "python-docs")
    ]
    codes, text = ranks.run(1, "train", "configs/demo.yaml", "--dry-run", *overrides)
    assert codes == [2]
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: data.streams.python-docs.path: ")
