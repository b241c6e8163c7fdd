"""Metrics, intervals and tests of rankings."""

import math

import numpy as np
import pytest
import pytrec_eval
from scipy.stats import ttest_rel

from evals.bm25 import Bm25, words
from evals.ranking import interval, mean, measured, over_queries, paired

RELEVANCE = {"a": {"1": 3, "2": 1, "3": 0}, "b": {"4": 1}, "c": {"1": 1}, "d": {"5": 2, "6": 1}}
RANKING = {
    "a": {"2": 0.9, "3": 0.8, "1": 0.7, "9": 0.1},
    "b": {str(number): 1 - number / 100 for number in range(20, 40)} | {"4": 0.01},
    "c": {},
}


def by_hand(metric: str, query: str) -> float:
    """The same from its definition. Ties come in falling order of ids."""
    row = RELEVANCE[query]
    order = sorted(RANKING.get(query, {}).items(), key=lambda hit: (hit[1], hit[0]), reverse=True)
    names = [name for name, _ in order]
    if metric == "ndcg@10":
        gain = sum(row.get(name, 0) / math.log2(rank + 1) for rank, name in enumerate(names[:10], 1))
        best = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(sorted(row.values(), reverse=True)[:10], 1))
        return gain / best
    relevant = {name for name, grade in row.items() if grade > 0}
    if metric == "recall@100":
        return len(relevant & set(names[:100])) / len(relevant)
    return next((1 / rank for rank, name in enumerate(names[:10], 1) if name in relevant), 0.0)


def test_metrics_are_those_of_their_definitions() -> None:
    found = measured(RELEVANCE, RANKING)
    for metric, values in found.items():
        assert values == pytest.approx({query: by_hand(metric, query) for query in RELEVANCE}, abs=1e-7), metric
    assert found["mrr@10"] == {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0}, "rank 21 is behind the tenth"
    assert found["recall@100"]["b"] == 1
    assert 0.6 < found["ndcg@10"]["a"] < 0.8, "grades count"


def test_metrics_are_those_of_trec_eval() -> None:
    rng = np.random.default_rng(3)
    relevance = {str(q): {str(d): int(rng.integers(0, 4)) for d in rng.integers(0, 300, 20)} for q in range(20)}
    ranking = {q: {str(d): float(rng.integers(0, 50)) for d in range(300)} for q in relevance}  # with many ties
    found = measured(relevance, ranking)
    theirs = pytrec_eval.RelevanceEvaluator(relevance, {"ndcg_cut", "recall", "recip_rank"}).evaluate(ranking)
    for ours, name in (("ndcg@10", "ndcg_cut_10"), ("recall@100", "recall_100")):
        assert found[ours] == {query: values[name] for query, values in theirs.items()}
    cut = {query: value if (value := values["recip_rank"]) >= 0.1 else 0.0 for query, values in theirs.items()}
    assert found["mrr@10"] == cut


def test_a_query_without_hits_counts() -> None:
    assert mean(measured(RELEVANCE, {"b": {"4": 1.0}})["ndcg@10"]) == 0.25


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        values = {str(number): float(value) for number, value in enumerate(rng.beta(2, 5, 60))}
        low, high = interval(values, 999, 0, "test")
        assert low < mean(values) < high
        inside += low <= 2 / 7 <= high
    assert 178 <= inside <= 198, "95 % of 200 and three deviations"  # measured 190


def test_intervals_are_a_function_of_the_key_and_not_of_the_order() -> None:
    values = {str(number): (number % 7) / 7 for number in range(40)}
    one = interval(values, 999, 0, "x")
    assert interval(dict(reversed(values.items())), 999, 0, "x") == one
    assert interval(values, 999, 1, "x") != one
    assert interval(dict.fromkeys(values, 0.5), 999, 0, "x") == (0.5, 0.5)


def test_a_paired_test_finds_what_is_there_and_nothing_else() -> None:
    rng = np.random.default_rng(1)
    base = {str(number): float(value) for number, value in enumerate(rng.random(80))}
    better = {query: value + 0.05 + 0.05 * rng.standard_normal() for query, value in base.items()}
    found = paired(better, base, 999, 0, "test")
    assert found.difference == pytest.approx(mean(better) - mean(base))
    assert 0 < found.low < found.difference < found.high
    assert found.permuted <= 0.002
    assert found.student == pytest.approx(float(ttest_rel(list(better.values()), list(base.values())).pvalue))
    noise = {query: value + 0.05 * rng.standard_normal() for query, value in base.items()}
    assert paired(noise, base, 999, 0, "test").permuted > 0.05
    assert paired(base, base, 999, 0, "test").permuted == 1.0
    with pytest.raises(ValueError, match="queries are not the same"):
        paired(base, {"1": 0.0}, 999, 0, "test")


def test_of_seeds_each_query_has_its_mean() -> None:
    assert over_queries([{"a": 0.0, "b": 1.0}, {"b": 0.5, "a": 1.0}]) == {"a": 0.5, "b": 0.75}


def test_bm25_is_that_of_its_formula() -> None:
    documents = {"one": "Steel and sea, sea!", "two": "the sea", "three": "bread 42 at_home"}
    assert words("At_home, 42 É!") == ["at", "home", "42", "é"]
    found = Bm25(documents).search(["sea 42", "nothing here"], 5)
    lengths = {name: len(words(text)) for name, text in documents.items()}
    average = sum(lengths.values()) / 3

    def score(name: str, query: list[str]) -> float:
        total = 0.0
        for word in query:
            frequency = words(documents[name]).count(word)
            containing = sum(word in words(text) for text in documents.values())
            idf = math.log(1 + (3 - containing + 0.5) / (containing + 0.5))
            total += idf * frequency / (frequency + 0.9 * (1 - 0.4 + 0.4 * lengths[name] / average))
        return total

    assert found[0] == pytest.approx({name: score(name, ["sea", "42"]) for name in documents}, rel=1e-5)
    assert list(found[0]) == sorted(found[0], key=lambda name: -found[0][name])
    assert found[1] == {}
