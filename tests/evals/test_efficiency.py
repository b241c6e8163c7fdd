"""Speed by turns: what is measured, of what, and what is left out."""

import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from evals.efficiency import Lengths, make_documents
from evals.interface import Model
from evals.speed import largest_batch
from tests.helpers.texts import evaluation

SHORT = {"longest": 64, "mean": 32.0, "deviation": 8.0}


@pytest.mark.parametrize("most", [1, 7, 64, 1000])
def test_the_largest_batch_is_found_to_an_eighth(most: int) -> None:
    for limit in (0, 1, 2, 3, 5, 8, 9, 31, 33, 63, 64, 65, 500, 999, 5000):
        tried: list[int] = []

        def fits(size: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(size)
            return size <= limit

        found, best = largest_batch(fits, most), min(limit, most)
        assert found <= best
        assert found >= best - max(1, found // 8)
        assert (found > 0) == (best > 0)
        assert max(tried) <= most
        assert len(tried) <= 2 * most.bit_length() + 4


def test_documents_are_the_same_every_time_and_as_long_as_asked_for() -> None:
    lengths = Lengths(longest=512, mean=256, deviation=64)
    documents = make_documents(lengths, 2000, 97, {3, 4}, 42)
    sizes = [len(ids) for ids in documents]
    assert statistics.mean(sizes) == pytest.approx(256, abs=5)
    assert statistics.pstdev(sizes) == pytest.approx(64, abs=4)
    assert max(sizes) <= 512
    assert min(sizes) >= 1
    every = {int(number) for ids in documents for number in ids}
    assert every == set(range(97)) - {3, 4}
    again = make_documents(lengths, 2000, 97, {3, 4}, 42)
    assert all(one.equal(other) for one, other in zip(documents, again, strict=True))
    assert not make_documents(lengths, 1, 97, {3, 4}, 43)[0].equal(documents[0])
    assert {len(ids) for ids in make_documents(Lengths(longest=8, mean=8, deviation=0), 5, 9, set(), 0)} == {8}
    cut = [len(ids) for ids in make_documents(Lengths(longest=8, mean=6, deviation=9), 200, 9, set(), 0)]
    assert (min(cut), max(cut)) == (1, 8)


def test_speed_is_of_the_versions_that_ran(model: Model) -> None:
    speed = evaluation(name="efficiency", lengths=[SHORT], kinds=["fixed"])
    (cell,) = speed.cells(model, {})
    assert cell.settings["versions"] == {"torch": version("torch"), "transformers": version("transformers")}


def test_both_runtimes_by_turns(model: Model, tmp_path: Path) -> None:
    speed = evaluation(
        name="efficiency",
        documents=6,
        lengths=[SHORT, {"longest": 512, "mean": 256.0, "deviation": 64.0}],
        rounds=3,
        batch_tokens=128,
    )
    cells = speed.cells(model, {})
    assert [cell.name for cell in cells] == ["fixed-64", "variable-64"]  # the model takes 256 tokens
    assert {cell.group for cell in cells} == {"all"}
    results = {cell.name: speed.compute(cell, model, tmp_path) for cell in cells}
    assert results["fixed-64"]["tokens"] == 6 * 64
    assert results["variable-64"]["tokens"] < 6 * 64
    for result in results.values():
        assert list(result["runtimes"]) == ["flexbert", "transformers"]
        for runtime in result["runtimes"].values():
            assert (runtime["batch"], len(runtime["seconds"])) == (2, 3)
            assert runtime["tokens/s"] == result["tokens"] / statistics.median(runtime["seconds"])
    scores: Any = speed.scores(model, results)
    assert scores["fixed 64 ratio"] == pytest.approx(
        scores["fixed 64 flexbert tokens/s"] / scores["fixed 64 transformers tokens/s"], rel=0.01
    )
    assert scores["fixed 512"] == scores["variable 512"] == "longer than the model takes"
    assert not any("GiB" in name for name in scores)


def test_one_runtime_alone_has_no_ratio(model: Model, tmp_path: Path) -> None:
    speed = evaluation(
        name="efficiency", documents=2, lengths=[SHORT], kinds=["fixed"], runtimes=["transformers"], rounds=1
    )
    results = {cell.name: speed.compute(cell, model, tmp_path) for cell in speed.cells(model, {})}
    assert list(speed.scores(model, results)) == ["fixed 64 transformers tokens/s", "fixed 64 transformers batch"]


def test_lengths_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lengths: longest: a value stands there twice: \[64, 64\]"):
        evaluation(name="efficiency", lengths=[SHORT, {**SHORT, "mean": 16.0}])
