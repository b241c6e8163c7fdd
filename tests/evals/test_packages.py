"""What only evaluations need is missed before anything is computed, in one line."""

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flexbert_core.schema import ConfigError
from recipe.config import load_run_config
from tests.helpers.evals import evaluation_of
from tests.helpers.process import ROOT
from tests.helpers.tiny import write_config
from training.trainer import train

IMPORTED = {"scikit-learn": "sklearn", "pytrec_eval-terrier": "pytrec_eval"}
TASK = "tasks=[{name: mine, data: nowhere, text: text, label: label, metrics: [%s]}]"


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    found = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name in packages else found(name, package)

    monkeypatch.setattr("importlib.util.find_spec", find_spec)


@pytest.mark.parametrize(
    ("file", "overrides", "package", "said"),
    [
        ("glue", [TASK % "accuracy, f1"], "sklearn", "glue: needs scikit-learn: make setup-eval"),
        ("glue", ["tasks=[cola]", "data=x"], "sklearn", "glue: needs scikit-learn: make setup-eval"),
        ("linear-probe", [TASK % "accuracy"], "sklearn", "linear-probe: needs scikit-learn: make setup-eval"),
        ("sts", [], "sentence_transformers", "sts: needs sentence-transformers: make setup-eval"),
        ("scifact", [], "bm25s", "scifact: needs bm25s: make setup-eval"),
        ("scifact", [], "pytrec_eval", "scifact: needs pytrec_eval-terrier: make setup-eval"),
        ("scifact", ["methods=[multi_vector]"], "pylate", "scifact: needs pylate: make setup-eval"),
        ("scifact", ["methods=[multi_vector]"], "fast_plaid", "scifact: needs fast-plaid: make setup-eval"),
        ("scifact", ["mteb=[x]"], "mteb", "scifact: needs mteb: make setup-eval"),
    ],
)
def test_a_missing_package_is_said_before_data_are_read(
    file: str, overrides: list[str], package: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, package)
    with pytest.raises(ConfigError, match=f"{re.escape(said)}$"):
        evaluation_of(Path(f"configs/eval/{file}.yaml"), *overrides)


def test_a_run_that_it_follows_does_not_begin(monkeypatch: pytest.MonkeyPatch, tiny_data: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path, tiny_data, 2, "full", evaluations=[{"name": "eval", "files": ["masked", "sts"]}])
    without(monkeypatch, "sentence_transformers")
    with pytest.raises(ConfigError, match="sts: needs sentence-transformers: make setup-eval$"):
        train(load_run_config(file), Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_all_that_is_missing_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "pytrec_eval", "bm25s")
    with pytest.raises(ConfigError, match=r"pytrec_eval-terrier, bm25s: make setup-eval"):
        evaluation_of(Path("configs/eval/scifact.yaml"))


def test_a_metric_that_needs_no_package_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "sklearn")
    with pytest.raises(ConfigError, match=r"nowhere.*no such file"):
        evaluation_of(Path("configs/eval/glue.yaml"), TASK % "accuracy")


def test_each_package_that_evaluations_import_is_asked_for() -> None:
    """A package of requirements-eval.txt that some file of evals/ imports stands in a check, too."""
    lines = (ROOT / "requirements-eval.txt").read_text().splitlines()
    names = [re.split(r"[=\s]", line)[0] for line in lines if line and line[0] not in "#-"]
    only_here = {IMPORTED.get(name, name.replace("-", "_")) for name in names}
    imported, said = set[str](), set[str]()
    for file in (ROOT / "evals").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).split(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.Constant) and file.name != "packages.py":
                said.add(str(node.value))
    assert imported & only_here
    assert imported & only_here <= said
