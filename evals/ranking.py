"""How good rankings are: trec_eval's metrics for each query, their intervals, and whether two rankings differ.

Q queries.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.keyed import keyed_generator
from evals.beir import Relevance

DEPTH = 100
"""Documents of a ranking that metrics look at."""
METRICS = ("ndcg@10", "recall@100", "mrr@10")

Ranking = Mapping[str, Mapping[str, float]]
"""Scores of the documents found, by query."""
PerQuery = Mapping[str, float]


def measured(relevance: Relevance, ranking: Ranking) -> dict[str, dict[str, float]]:
    """Each metric of each judged query, by trec_eval. A query for which nothing was found has 0.

    ndcg@10 takes grades as gains, discounted by log2(rank + 1) (trec_eval's ndcg_cut). mrr@10 is 1 over the rank of
    the first relevant document, 0 behind the tenth. Documents with one score stand in falling order of their ids, as
    trec_eval has them.
    """
    import pytrec_eval

    judged = {query: dict(row) for query, row in relevance.items()}
    found = {query: dict(ranking[query]) for query in judged if ranking.get(query)}
    values = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "recall.100"}).evaluate(found)
    # trec_eval has no reciprocal rank with a cut.
    first = {query: dict(_best(row, 10)) for query, row in found.items()}
    ranks = pytrec_eval.RelevanceEvaluator(judged, {"recip_rank"}).evaluate(first)
    empty: dict[str, float] = {}
    return {
        "ndcg@10": {query: values.get(query, empty).get("ndcg_cut_10", 0.0) for query in judged},
        "recall@100": {query: values.get(query, empty).get("recall_100", 0.0) for query in judged},
        "mrr@10": {query: ranks.get(query, empty).get("recip_rank", 0.0) for query in judged},
    }


def _best(row: Mapping[str, float], count: int) -> list[tuple[str, float]]:
    # trec_eval compares scores as float32, then ids.
    return sorted(row.items(), key=lambda item: (np.float32(item[1]), item[0]), reverse=True)[:count]


def mean(values: PerQuery) -> float:
    return math.fsum(values.values()) / len(values)


def over_queries(of_seeds: Sequence[PerQuery]) -> dict[str, float]:
    """The mean over seeds for each query."""
    return {query: math.fsum(each[query] for each in of_seeds) / len(of_seeds) for query in of_seeds[0]}


def interval(values: PerQuery, resamples: int, seed: int, purpose: str) -> tuple[float, float]:
    """95 % interval of the mean over queries: BCa bootstrap over them (Efron 1987), by scipy."""
    from scipy.stats import bootstrap

    sample = _column(values)
    if len(sample) < 2 or float(np.ptp(sample)) == 0.0:
        return float(sample[0]), float(sample[0])  # nothing to resample
    found = bootstrap(
        (sample,),
        np.mean,
        n_resamples=resamples,
        batch=_at_once(len(sample)),
        method="BCa",
        rng=keyed_generator(seed, f"bootstrap {purpose}"),
    ).confidence_interval
    return float(found.low), float(found.high)


@dataclass(frozen=True)
class Paired:
    """One ranking against another over the same queries: the mean difference, its 95 % interval, and the probability
    of one as large, either way, if both were alike: by permuting signs, and by Student's t."""

    difference: float
    low: float
    high: float
    permuted: float
    student: float
    queries: int

    def __str__(self) -> str:
        return (
            f"{self.difference:+.4f} [{self.low:+.4f}, {self.high:+.4f}], p = {self.permuted:.2g} (permutation), "
            f"{self.student:.2g} (t), {self.queries} queries"
        )


def paired(values: PerQuery, others: PerQuery, resamples: int, seed: int, purpose: str) -> Paired:
    """`values` less `others`. Raises ValueError when they are of other queries."""
    from scipy.stats import permutation_test, ttest_rel

    if values.keys() != others.keys():
        raise ValueError("the queries are not the same")
    differences = {query: value - others[query] for query, value in values.items()}
    sample = _column(differences)
    if not sample.any():
        return Paired(0.0, 0.0, 0.0, 1.0, 1.0, len(sample))
    low, high = interval(differences, resamples, seed, f"difference {purpose}")
    permuted: Any = permutation_test(
        (sample,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=_at_once(len(sample)),
        rng=keyed_generator(seed, f"permutation {purpose}"),
    )
    student = float(ttest_rel(_column(values), _column(others)).pvalue) if np.ptp(sample) else 0.0
    return Paired(float(sample.mean()), low, high, float(permuted.pvalue), student, len(sample))


def _column(values: PerQuery) -> NDArray[np.float64]:
    """(Q,), in the order of ids, so that draws do not depend on the order of files."""
    return np.array([values[query] for query in sorted(values)], dtype=np.float64)


def _at_once(queries: int) -> int:
    """Resamples held in memory: about 80 MB."""
    return max(1, 10_000_000 // queries)
