"""From one supported stack to the other and back: `make smoke-next`. Not part of `make test`, which has one stack.

Each step runs in a process of the stack that takes it: exports are written by one and loaded by transformers of both;
runs are killed in one and finished in the other.
"""

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands.doctor import STACKS
from flexbert import build, to_hf
from tests.helpers.architectures import BERT, IDS, SANDWICH
from tests.helpers.continuing import hf_folder, prepare_data, write_terms
from tests.helpers.continuing import run_file as continued_file
from tests.helpers.models import scrambled, tiny
from tests.helpers.runs import ROOT, environment
from tests.helpers.tiny import ROW, ROWS, write_config, write_data
from tests.helpers.tokenizer import tokenizer_of

PYTHONS = {stack.name: ROOT / stack.folder / "bin" / "python" for stack in STACKS}
PINNED, NEXT = PYTHONS
WAYS = [(PINNED, NEXT), (NEXT, PINNED)]
PRESETS: dict[str, dict[str, Any]] = {"modernbert": {}, "bert": BERT, "own code": SANDWICH}
STEPS = 6

# python -m tests.stacks write NAME FOLDER | weights NAME FILE | load FOLDER FILE | continued EXPORT


def write(name: str, folder: str) -> None:
    """An export, and beside it the logits that it must give."""
    model = scrambled(build(tiny(**PRESETS[name], **IDS))).eval()
    to_hf(model, tokenizer_of(97), folder)
    ids = torch.arange(40) + 5
    logits = model(ids, torch.tensor([0, 40], dtype=torch.int32), 40).logits
    save_file({"ids": ids, "logits": logits.detach().contiguous()}, f"{folder}.logits")


def weights(name: str, file: str) -> None:
    """Those that the config's seed gives."""
    state = build(tiny(**PRESETS[name])).state_dict()
    save_file({key: value.clone() for key, value in state.items()}, file)


def load(folder: str, file: str) -> None:
    """Logits of an export in this process's transformers, and in FlexBERT."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from flexbert import from_hf

    ids = load_file(f"{folder}.logits")["ids"]
    arguments: Any = {"trust_remote_code": True, "local_files_only": True}
    theirs = AutoModelForMaskedLM.from_pretrained(folder, **arguments).eval()(ids[None]).logits[0]
    ours = from_hf(folder).eval()(ids, torch.tensor([0, 40], dtype=torch.int32), 40).logits
    assert len(AutoTokenizer.from_pretrained(folder)) == 97
    save_file({"transformers": theirs.detach().contiguous(), "FlexBERT": ours.detach().contiguous()}, file)


def continued(export: str) -> None:
    from tests.helpers.continuing import check_export

    check_export(Path(export))


def python(stack: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command in a stack; nobody is there to answer a question. folder: of the test."""
    if not PYTHONS[stack].exists():
        pytest.fail(f"{PYTHONS[stack]} is not there: make smoke-next makes it")
    variables = environment() | {"HF_MODULES_CACHE": str(folder / f"modules-{stack}")}
    command = [str(PYTHONS[stack]), *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False)  # fmt: skip


def ask(stack: str, *arguments: str, folder: Path) -> None:
    done = python(stack, "-m", "tests.stacks", *arguments, folder=folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stack", [PINNED, NEXT])
def test_the_doctor_names_the_stack(stack: str, tmp_path: Path) -> None:
    done = python(stack, "main.py", "doctor", folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert next(each for each in STACKS if each.name == stack).pins in done.stdout


@pytest.mark.parametrize("name", PRESETS)
def test_a_seed_means_the_same_weights(name: str, tmp_path: Path) -> None:
    files = [str(tmp_path / stack) for stack in PYTHONS]
    for stack, file in zip(PYTHONS, files, strict=True):
        ask(stack, "weights", name, file, folder=tmp_path)
    one, other = map(load_file, files)
    assert one.keys() == other.keys()
    for key, value in one.items():
        # uniform_ draws the same bits; erfinv may round the last one otherwise
        torch.testing.assert_close(value, other[key], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("writer", "reader"), WAYS)
def test_an_export_loads_in_the_other(name: str, writer: str, reader: str, tmp_path: Path) -> None:
    folder, file = str(tmp_path / "export"), str(tmp_path / "logits")
    ask(writer, "write", name, folder, folder=tmp_path)
    expected = load_file(f"{folder}.logits")["logits"]
    for stack in (writer, reader):
        ask(stack, "load", folder, file, folder=tmp_path)
        found = load_file(file)
        for runtime in ("transformers", "FlexBERT"):
            difference = (found[runtime] - expected).abs().max().item()
            assert difference < 2e-5, (stack, runtime)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
@pytest.mark.parametrize(("writer", "reader"), WAYS)
def test_a_model_continued_with_new_tokens_loads_in_the_other(
    kind: str, writer: str, reader: str, tmp_path: Path
) -> None:
    """It goes on from a folder that transformers 5 wrote."""
    hf_folder(tmp_path / "hf", kind)
    terms = write_terms(tmp_path)
    data = prepare_data(tmp_path, {"name": "load", "path": str(tmp_path / "hf"), "add": str(terms)})
    file = continued_file(tmp_path, str(tmp_path / "hf"), data / "tokenizer", tokens={"add": str(terms)})
    done = python(writer, "main.py", "train", str(file), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (export,) = (tmp_path / "run" / "exports").iterdir()
    for stack in (writer, reader):
        ask(stack, "continued", str(export), folder=tmp_path)


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "checkpoints" / f"tokens-{STEPS * ROWS * ROW}" / "model.safetensors")


def run_file(folder: Path, data: Path, **changes: Any) -> Path:
    imports = [str(ROOT / "tests" / "helpers" / "killer.py")]
    return write_config(folder, data, STEPS, "full", imports=imports, **changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By stack, a run that nothing interrupts."""
    folders = {}
    for stack in PYTHONS:
        folders[stack] = tmp_path_factory.mktemp("straight")
        done = python(stack, "main.py", "train", str(run_file(folders[stack], data)), folder=folders[stack])
        assert done.returncode == 0, done.stderr
    return folders


def test_both_train_the_same(straight: dict[str, Path]) -> None:
    one, other = (last_weights(folder) for folder in straight.values())
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=1e-3 * float(value.abs().max()))


@pytest.mark.parametrize(("first", "second"), [*WAYS, (NEXT, NEXT)])
def test_a_run_killed_in_one_is_finished_in_the_other(
    first: str, second: str, data: Path, straight: dict[str, Path], tmp_path: Path
) -> None:
    file = run_file(tmp_path, data, callbacks=[{"name": "killer", "steps": [4]}])
    assert python(first, "main.py", "train", str(file), folder=tmp_path).returncode == -signal.SIGKILL
    done = python(second, "main.py", "train", str(file), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"resuming after step [34]\b", done.stdout + done.stderr), (
        done.stdout
    )  # the saver may have been late
    ours, theirs = last_weights(tmp_path), last_weights(straight[second])
    for key, value in ours.items():
        if first == second:
            assert torch.equal(value, theirs[key]), key
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-3 * float(value.abs().max()))
    export = tmp_path / "run" / "exports" / f"tokens-{STEPS * ROWS * ROW}"
    assert (export / "model.safetensors").exists()
    assert "ModernBertForMaskedLM" in (export / "config.json").read_text()


if __name__ == "__main__":
    import sys

    os.environ["HF_HUB_OFFLINE"] = "1"
    {"write": write, "weights": weights, "load": load, "continued": continued}[sys.argv[1]](*sys.argv[2:])
