"""The library by itself: the wheel installed elsewhere, without the checkout, does what docs/library.md and the notebook say."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK: dict[str, Any] = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the wheel, and with the packages of this one."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(packages)]
    subprocess.run([*command, str(wheel)], check=True)
    return folder / "bin" / "python"


def run(python: Path, code: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf"), "TMPDIR": str(cwd)}
    command = [str(python), "-I", "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_the_library_its_presets_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = next(name.partition("/")[0] for name in names if name.endswith("/METADATA"))
    assert {name.partition("/")[0] for name in names} == {"flexbert", "flexbert_core", info}
    presets = {f"flexbert/presets/{file.name}" for file in (ROOT / "configs" / "model").glob("*.yaml")}
    modules = {
        file.relative_to(ROOT).as_posix()
        for room in ("flexbert", "flexbert_core")
        for file in (ROOT / room).rglob("*.py")
    }
    assert {name for name in names if not name.startswith(info)} == presets | modules
    metadata = zipfile.ZipFile(wheel).read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0\nLicense-File: LICENSE\n" in metadata
    assert (ROOT / "README.md").read_text().splitlines()[0] in metadata


def test_what_the_library_asks_for_fits_the_pins_of_a_run() -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [
        *(ROOT / "requirements.txt").read_text().splitlines(),
        *(ROOT / "constraints.txt").read_text().splitlines(),
    ]
    pins = dict(line.split("#")[0].strip().lower().split("==") for line in lines if "==" in line and line[0] != "-")
    for dependency in map(Requirement, project["dependencies"]):
        assert pins[dependency.name.lower()] in dependency.specifier, dependency


LIBRARY = """
import importlib.util, sys
from pathlib import Path
import torch, flexbert
from pydantic import Field
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast
from flexbert_core.schema import Component

assert Path(flexbert.__file__).is_relative_to(sys.prefix), flexbert.__file__
assert not [name for name in ("recipe", "training", "callbacks", "commands", "main", "ranks") if importlib.util.find_spec(name)]
presets = sorted(file.stem for file in (Path(flexbert.__file__).parent / "presets").glob("*.yaml"))
assert "bert-base" in presets and "modernbert-large" in presets
for preset in presets:
    with torch.device("meta"):
        flexbert.build(flexbert.FlexBertConfig.from_yaml(preset))
assert flexbert.FlexBertConfig.from_yaml("bert-base").hidden_size == 768

@flexbert.register("norm", "halved")
class Halved(nn.LayerNorm):
    class Config(Component):
        factor: float = Field(0.5, gt=0)

    def __init__(self, config, *, hidden_size):
        super().__init__(hidden_size)
        self.factor = config.factor

    def forward(self, states):
        return super().forward(states) * self.factor

small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
batch = torch.arange(12) + 5, torch.tensor([0, 5, 12], dtype=torch.int32), 7
labels = torch.where(torch.arange(12) % 3 == 0, batch[0], -100)
for change in ({}, {"norm": {"name": "halved", "factor": 0.25}}):
    config = flexbert.FlexBertConfig.from_dict({**small, **change})
    model = flexbert.build(config)
    model(*batch, labels).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for task, rows in (("classification", 2), ("tokens", 12)):
        classifier = flexbert.build(config, task=task, num_labels=3)
        output = classifier(*batch, torch.zeros(rows, dtype=torch.int64))
        output.loss.backward()
        assert output.logits.shape == (rows, 3)
assert "halved" in flexbert.registered("norm")

special = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "cls", "sep", "pad", "mask")}
words = [*special.values(), *map(str, range(59))]
backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
for name, change in (("plain", {}), ("code", {"norm": "rmsnorm"})):
    model = flexbert.build(flexbert.FlexBertConfig.from_dict({**small, **change})).eval()
    flexbert.to_hf(model, tokenizer, name)
    again = flexbert.from_hf(name).eval()
    assert torch.equal(again(*batch).logits, model(*batch).logits)
    theirs = AutoModelForMaskedLM.from_pretrained(name, trust_remote_code=name == "code").eval()
    torch.testing.assert_close(theirs(batch[0][None, :5]).logits[0], model(*batch).logits[:5], atol=1e-5, rtol=0)
"""


@pytest.mark.slow
def test_the_installed_library_does_all_that_it_offers(python: Path, tmp_path: Path) -> None:
    run(python, LIBRARY, tmp_path)


@pytest.mark.slow
def test_what_the_pages_say_of_the_library_runs_in_it(python: Path, tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().partition("## As a library")[2].partition("\n## ")[0]
    blocks = [
        block.partition("```")[0]
        for text in (section, (ROOT / "docs" / "library.md").read_text())
        for block in text.split("```python\n")[1:]
    ]
    assert len(blocks) >= 3
    run(python, "\n".join(blocks), tmp_path)


@pytest.mark.slow
def test_the_notebook_runs_in_it_and_the_accuracy_rises(python: Path, tmp_path: Path) -> None:
    found = "import json; print(json.dumps([accuracies, difference]))"
    accuracies, difference = json.loads(run(python, "\n".join([*CODE, found]), tmp_path).splitlines()[-1])
    assert accuracies[0] < 0.6
    assert accuracies[-1] > 0.85
    assert difference < 1e-4


def test_the_notebook_is_committed_with_outputs_and_without_paths_of_a_machine() -> None:
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell, text in zip(cells, CODE, strict=True):
        assert bool(cell["outputs"]) == any(line.lstrip().startswith("print(") for line in text.splitlines()), text
    raw = (ROOT / "examples" / "quickstart.ipynb").read_text()
    assert not [path for path in ("/tmp", "/home", "/root", "/work", "C:\\") if path in raw]
    assert len(raw) < 20_000
