"""Metrics of classes and of scores, by scikit-learn and scipy.

What has no value by definition, since all predictions or all labels are alike, is 0: Matthews' correlation, Pearson's
and Spearman's, and F1 without a true positive. So a run that has collapsed to one answer scores 0 there.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Metric:
    kind: Literal["classes", "score"]
    function: Callable[[Any, Any], float]
    package: str | None = None
    """Imported by it, where only evaluations need it."""


def _accuracy(labels: Any, found: Any) -> float:
    return float(np.mean(np.equal(labels, found)))


def _f1(labels: Any, found: Any) -> float:
    from sklearn.metrics import f1_score

    zero: Any = 0
    return float(f1_score(labels, found, pos_label=1, average="binary", zero_division=zero))


def _mcc(labels: Any, found: Any) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, found))


def _pearson(labels: Any, found: Any) -> float:
    from scipy.stats import pearsonr

    return _or_zero(lambda: pearsonr(labels, found)[0])


def _spearman(labels: Any, found: Any) -> float:
    from scipy.stats import spearmanr

    return _or_zero(lambda: spearmanr(labels, found).statistic)


def _or_zero(function: Callable[[], Any]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy says that an input is constant
        value = float(function())
    return value if math.isfinite(value) else 0.0


METRICS = {
    "accuracy": Metric("classes", _accuracy),
    "f1": Metric("classes", _f1, "sklearn"),
    "mcc": Metric("classes", _mcc, "sklearn"),
    "pearson": Metric("score", _pearson),
    "spearman": Metric("score", _spearman),
}


def scored(metrics: Sequence[str], labels: Sequence[Any], found: Sequence[Any]) -> dict[str, float]:
    """Each metric of predictions, and `score`, their mean."""
    values = {name: METRICS[name].function(np.asarray(labels), np.asarray(found)) for name in metrics}
    return {**values, "score": math.fsum(values.values()) / len(values)}
