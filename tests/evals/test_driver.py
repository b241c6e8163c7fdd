"""Cells are computed once, go on where they ended, and stand side by side; one that fails costs nothing else."""

import csv
import json
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import main
from commands.evaluate import run_eval
from evals.config import overrides_of
from evals.interface import EVALS, Cell, CelledEval, Eval, EvalConfig, Model
from evals.models import digest_of, resolve
from flexbert_core.schema import Component, ConfigError, RunError, UserPath
from jobs.base import JOBS, Changed, Job, JobExecutor
from tests.helpers.exports import write_export
from tests.helpers.runs import ROOT, command, run


@EVALS.register("test_sums")
class Sums(CelledEval):
    """Numbers, and a last cell whose settings depend on them."""

    class Config(EvalConfig):
        numbers: list[int]
        broken: list[int] = []
        odd: dict[str, str] = {}  # by number, what its result is
        unknown: str = ""  # label of a model that there are no cells of
        no_scores: str = ""  # of one that there are no scores of
        alone: bool = False  # there is nothing but the models' own scores
        log: str

    def cells(self, model: Model, results: Any) -> list[Cell]:
        if model.label == self.config.unknown:
            raise ConfigError(f"{model.folder}: no tokenizer")
        first = [Cell(f"of/{number}", {"number": number}, group=f"g{number % 2}") for number in self.config.numbers]
        if any(cell.name not in results for cell in first):
            return first
        return [*first, Cell("total", {"of": [results[cell.name]["value"] for cell in first]})]

    def compute(self, cell: Cell, model: Model, out: Path) -> Any:
        with Path(self.config.log).open("a") as log:
            log.write(f"{model.label} {cell.name}\n")
        if cell.name == "total":
            return {"value": sum(cell.settings["of"])}
        if cell.settings["number"] in self.config.broken:
            raise RunError(f"number {cell.settings['number']} is broken")
        odd = {"nan": {"value": [1.0, math.nan]}, "keys": {("a", "b"): 1}}
        return odd.get(self.config.odd.get(str(cell.settings["number"]), ""), {"value": cell.settings["number"] * 10})

    def scores(self, model: Model, results: Any) -> Any:
        if model.label == self.config.no_scores:
            raise ZeroDivisionError("no queries")
        return {"total": results["total"]["value"]}

    def compare(self, results: Any, out: Path) -> list[str]:
        if self.config.alone:
            raise ZeroDivisionError("no pairs")
        return []

    def scores_without_model(self) -> Any:
        if self.config.alone:
            raise RunError("no rows")
        return {"nothing": {"total": 0}}


@EVALS.register("test_words")
class Words(Eval):
    """Words of texts, without a model."""

    class Config(EvalConfig):
        texts: list[UserPath]
        more: dict[str, list[UserPath]] = {}

    def run(self, model: Model, out: Path) -> Any:
        texts = [*self.config.texts, *(text for texts in self.config.more.values() for text in texts)]
        return {"words": sum(len(file.read_text().split()) for text in texts for file in Path(text).iterdir())}


@JOBS.register("test_dying")
class Dying(JobExecutor):
    """Its jobs die before they do anything."""

    class Config(Component):
        pass

    def run(self, jobs: Sequence[Job], changed: Changed) -> None:
        for job in jobs:
            changed(job, None)
            changed(job, -9)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("exports")
    return write_export(folder / "one"), write_export(folder / "two", seed=1)


def results_of(folder: Path, name: str) -> str:
    (file,) = folder.glob(f"{name}-*/results.json")
    return file.read_text()


class Desk:
    """A place to evaluate at: an eval file, its results, and what was computed."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.folder, self.out, self.log = folder, folder / "results", folder / "log"
        self.file = folder / "sums.yaml"
        self.write(**config)

    def write(self, **config: Any) -> None:
        self.folder.mkdir(exist_ok=True)
        node = {"name": "test_sums", "numbers": [1, 2, 3], "log": str(self.log), **config}
        self.file.write_text(json.dumps({"evaluation": node}))

    def run(self, *arguments: Any) -> bool:
        return run_eval(str(self.file), [str(each) for each in arguments], self.out, Console(quiet=True))

    def computed(self) -> list[str]:
        """Since it was asked last."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def place(self, name: str) -> Path:
        (found,) = (self.out / "sums").glob(f"{name}-*")
        return found

    def results(self, name: str) -> Any:
        return json.loads((self.place(name) / "results.json").read_text())


def test_models_stand_side_by_side_and_nothing_is_done_twice(exports: tuple[Path, Path], tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    assert desk.run(*exports)
    first = ["of/1", "of/2", "of/3"]
    assert desk.computed() == [
        *(f"one {cell}" for cell in first),
        *(f"two {cell}" for cell in first),
        "one total",
        "two total",
    ]
    rows = list(csv.DictReader((desk.out / "table.csv").read_text().splitlines()))
    assert [(row["model"], row["score"], row["value"]) for row in rows] == [
        ("one", "sums: total", "60"),
        ("two", "sums: total", "60"),
        ("nothing", "sums: total", "0"),
    ]
    assert (
        desk.out / "table.md"
    ).read_text() == "| | one | two | nothing |\n|---|---|---|---|\n| sums: total | 60 | 60 | 0 |\n"
    node = desk.results("two")
    assert node["scores"] == {"total": 60}
    assert node["complete"]
    assert node["model"]["digest"] == digest_of(exports[1])
    assert node["cells"]["of/2"] == {"value": 20}
    assert {"torch", "transformers"} <= node["versions"].keys()
    assert desk.run(*exports)
    assert desk.computed() == []


def test_more_cells_are_added_and_other_weights_are_another_model(exports: tuple[Path, Path], tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.run(exports[0])
    desk.computed()
    assert desk.run(exports[0], "numbers=[3,2,1,4]")
    assert desk.computed() == ["one of/4", "one total"]
    moved = tmp_path / "one"
    subprocess.run(["cp", "-r", exports[0], moved], check=True)
    assert desk.run(moved)
    assert desk.computed() == []  # the same bytes elsewhere
    write_export(moved, seed=5)
    assert desk.run(moved)
    assert len(desk.computed()) == 4


def test_a_failing_cell_costs_nothing_else_and_leaves_no_mean(exports: tuple[Path, Path], tmp_path: Path) -> None:
    desk = Desk(tmp_path, broken=[2])
    assert not desk.run(exports[0])
    assert desk.computed() == ["one of/1", "one of/2", "one of/3"]
    node = desk.results("one")
    assert node["scores"] is None
    assert not node["complete"]
    assert node["failed"] == {"of/2": "number 2 is broken"}
    assert "incomplete (1 failed)" in (desk.out / "table.md").read_text()
    desk.write()
    assert desk.run(exports[0])
    assert desk.computed() == ["one of/2", "one total"]
    assert not list((desk.place("one") / "failed").rglob("*.txt"))


def test_a_damaged_result_is_said(exports: tuple[Path, Path], tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.run(exports[0])
    (file,) = (desk.place("one") / "cells" / "of").glob("1-*.json")
    file.write_text("{")
    desk.computed()
    assert not desk.run(*exports)
    assert re.search(r"1-\w+-1\.json: damaged: remove it", desk.results("one")["failed"]["of/1"])
    assert desk.results("two")["scores"] == {"total": 60}
    assert len(desk.computed()) == 4


def test_a_model_without_cells_or_scores_costs_the_others_nothing(exports: tuple[Path, Path], tmp_path: Path) -> None:
    for key, failed in (
        ("unknown", {"its cells": f"{exports[0]}: no tokenizer"}),
        ("no_scores", {"its scores": "ZeroDivisionError: no queries"}),
    ):
        desk = Desk(tmp_path / key, **{key: "one"})
        assert not desk.run(*exports)
        assert desk.results("one")["failed"] == failed
        assert desk.results("one")["scores"] is None
        assert desk.results("two")["scores"] == {"total": 60}
        assert "| incomplete (1 failed) |  |" in (desk.out / "table.md").read_text()


def test_what_cannot_be_compared_costs_no_scores(exports: tuple[Path, Path], tmp_path: Path) -> None:
    desk = Desk(tmp_path, alone=True)
    assert not desk.run(*exports)
    assert "| sums: total | 60 | 60 |" in (desk.out / "table.md").read_text()


def test_a_result_that_cannot_be_kept_costs_its_cell(exports: tuple[Path, Path], tmp_path: Path) -> None:
    desk = Desk(tmp_path, odd={"1": "nan", "2": "keys"})
    assert not desk.run(exports[0])
    assert desk.computed() == ["one of/1", "one of/2", "one of/3"]
    failed = desk.results("one")["failed"]
    assert failed["of/1"].startswith("result.value.1 is nan: a result holds finite numbers")
    assert failed["of/2"].startswith("TypeError: keys must be str")
    assert desk.results("one")["cells"] == {"of/3": {"value": 30}}


def test_a_place_that_takes_no_files_costs_its_cell(exports: tuple[Path, Path], tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.run(exports[0], "numbers=[]")
    (desk.place("one") / "cells" / "of").write_text("")
    (desk.place("one") / "failed").write_text("")
    assert not desk.run(exports[0])
    assert set(desk.results("one")["failed"]) == {"of/1", "of/2", "of/3"}


def test_versions_are_those_that_cells_were_computed_with(exports: tuple[Path, Path], tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.run(exports[0])
    ours = desk.results("one")["versions"]["torch"]
    for number, versions in ((1, {"torch": "1.0"}), (2, None)):
        (file,) = (desk.place("one") / "cells" / "of").glob(f"{number}-*.json")
        node = {key: value for key, value in json.loads(file.read_text()).items() if key != "versions"}
        file.write_text(json.dumps(node | ({} if versions is None else {"versions": versions})))
    assert desk.run(exports[0])
    found = desk.results("one")["versions"]
    assert found["torch"] == f"1.0, {ours}"
    assert found["of cells before 2026-12"] == "not noted"


def test_what_failed_before_is_not_why_a_job_dies(exports: tuple[Path, Path], tmp_path: Path) -> None:
    desk = Desk(tmp_path, broken=[1])
    desk.run(exports[0])
    assert desk.results("one")["failed"] == {"of/1": "number 1 is broken"}
    desk.run(exports[0], "executor=test_dying")
    assert desk.results("one")["failed"] == {"of/1": "its job ended without a word: see logs/"}


def test_what_is_wrong_is_said_before_anything_is_computed(exports: tuple[Path, Path], tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    for arguments, message in [
        ((), "eval: no model"),
        ((tmp_path / "no",), "no: no such folder: give a run"),
        ((tmp_path,), "has no config.json, and is no run or checkpoint"),
        ((exports[0], exports[0]), "one: is given twice"),
        ((f"{exports[0]}@tokens-3",), "is no run, so @tokens-3 says nothing"),
        ((exports[0], "nubers=[1]"), r"sums\.yaml: evaluation: unknown key 'nubers', did you mean 'numbers'"),
        ((exports[0], "executor=locl"), "unknown executor of jobs 'locl', did you mean 'local'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            desk.run(*arguments)
    assert desk.computed() == []


def test_overrides_go_to_the_evaluation_that_they_name() -> None:
    names = ["glue", "sums"]
    given = ["executor=local", "sums.numbers=[1]", "glue.seeds=[3]"]
    assert overrides_of("sums", names, given) == ["executor=local", "evaluation.numbers=[1]"]
    assert overrides_of("glue", names, given) == ["executor=local", "evaluation.seeds=[3]"]


def test_fresh_weights_are_a_model_of_the_same_architecture(exports: tuple[Path, Path], tmp_path: Path) -> None:
    given, fresh = resolve([str(exports[0]), f"{exports[0]}@random"], tmp_path)
    assert fresh.label == "one@random"
    assert fresh.digest != given.digest
    config, other = ((model.folder / "config.json").read_text() for model in (given, fresh))
    assert config == other
    (again,) = resolve([f"{exports[0]}@random"], tmp_path)
    assert again.digest == fresh.digest


def test_labels_tell_models_apart(exports: tuple[Path, Path], tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        subprocess.run(["cp", "-r", exports[0], tmp_path / parent / "same"], check=True)
    models = resolve([str(tmp_path / parent / "same") for parent in ("a", "b")], tmp_path)
    assert [model.label for model in models] == ["a/same", "b/same"]
    assert models[0].digest == models[1].digest


def test_results_lie_where_they_lay_whatever_stands_beside_the_model(
    exports: tuple[Path, Path], tmp_path: Path
) -> None:
    """Models of one name, one by one and together: each keeps its results, and nothing is computed twice."""
    desk, places = Desk(tmp_path), [tmp_path / parent / "checkpoint-5" for parent in ("a", "b")]
    for place, export in zip(places, exports, strict=True):
        shutil.copytree(export, place)
        assert desk.run(place)
    assert len(desk.computed()) == 8
    digests = {json.loads(file.read_text())["model"]["digest"] for file in desk.out.glob("sums/*/results.json")}
    assert digests == {digest_of(place) for place in places}
    assert desk.run(*places)
    assert desk.run(*reversed(places))
    assert desk.computed() == []
    assert len(list(desk.out.glob("sums/*"))) == 2


def test_results_of_before_are_used(exports: tuple[Path, Path], tmp_path: Path) -> None:
    """They lay under the label alone; those of other weights stay where they are."""
    desk = Desk(tmp_path)
    desk.run(exports[0])
    desk.computed()
    older = desk.out / "sums" / "one"
    desk.place("one").rename(older)
    assert desk.run(shutil.copytree(exports[1], tmp_path / "one"))
    assert len(desk.computed()) == 4
    assert older.is_dir()
    assert desk.run(exports[0])
    assert desk.computed() == []
    assert not older.exists()


def test_other_data_under_the_same_name_are_evaluated_anew(exports: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.md").write_text("one two")
    file = tmp_path / "words.yaml"
    evaluation = {"name": "test_words", "texts": [str(tmp_path / "data")]}
    file.write_text(json.dumps({"evaluation": evaluation}))

    def words() -> int:
        assert run_eval(str(file), [str(exports[0])], tmp_path / "out", Console(quiet=True))
        return json.loads(results_of(tmp_path / "out/words", "one"))["scores"]["words"]

    assert words() == 2
    (tmp_path / "data" / "a.md").write_text("one two three")
    assert words() == 3
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.md").write_text("four")
    file.write_text(json.dumps({"evaluation": {**evaluation, "more": {"en": [str(tmp_path / "more")]}}}))
    assert words() == 4
    (tmp_path / "more" / "a.md").write_text("four five")
    assert words() == 5


def test_results_lie_in_results_where_no_folder_is_given(
    exports: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main.app(["eval", str(desk.file), str(exports[0])])
    assert stop.value.code == 0
    assert desk.results("one")["scores"] == {"total": 60}


@pytest.mark.slow
def test_jobs_compute_the_same(exports: tuple[Path, Path], tmp_path: Path) -> None:
    """In processes, two at once, through the command line; killed jobs are told apart by their logs."""
    (tmp_path / "made").mkdir()
    file = tmp_path / "weigh.yaml"
    file.write_text(
        f"imports: [{ROOT}/tests/helpers/weigher.py]\n"
        f"evaluation: {{name: weigher, count_in: {tmp_path}/made, refuses: two}}\n"
        "executor: {name: local, at_once: 2, cores_per_job: 1, gpus_per_job: 0}\n"
    )
    arguments = [str(file), *map(str, exports), "--output", str(tmp_path / "jobs")]
    done = run(command("eval", *arguments))
    assert done.returncode == 1, done.stderr
    assert "weigh two all: exit code 1: warning: weigh  two  all: refused (log: " in done.stdout
    one = json.loads(results_of(tmp_path / "jobs/weigh", "one"))
    two = json.loads(results_of(tmp_path / "jobs/weigh", "two"))
    assert two["failed"] == {"all": "refused"}
    here = run(command("eval", str(file), str(exports[0]), "executor=null", "--output", str(tmp_path / "here")))
    assert here.returncode == 0, here.stderr
    assert json.loads(results_of(tmp_path / "here/weigh", "one"))["scores"] == one["scores"]
    assert len(list((tmp_path / "made").iterdir())) == 3
