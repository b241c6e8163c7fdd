"""Scores of seeds, and the table of all models."""

import pytest

from evals.results import ScoreTable, flat_scores, numbers, over_seeds


def test_scores_of_seeds() -> None:
    score = over_seeds([1.0, 2.0, 6.0])
    assert score == {"mean": 3.0, "deviation": pytest.approx(7**0.5), "best": 6.0, "seeds": 3}
    assert over_seeds([2.0])["deviation"] is None
    nested = {"a": score, "b": {"c": 1, "d": 2.5}}
    assert flat_scores(nested) == {"a": score, "b c": 1, "b d": 2.5}
    assert numbers(nested) == {"a": 3.0, "b c": 1, "b d": 2.5}


def test_a_table_escapes_what_markdown_reads() -> None:
    table = ScoreTable()
    table.add("e", "a|b", {"x": 0.5})
    assert table.markdown().splitlines()[0] == "| | a\\|b |"
