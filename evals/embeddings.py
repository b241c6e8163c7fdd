"""Alignment and uniformity of embeddings on the unit sphere (Wang & Isola 2020, arXiv 2005.10242)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from evals.embedding_models import EmbeddingConfig, EmbeddingModel, embedding_settings
from evals.interface import EVALS, Cell, CelledEval, Model, Scores
from evals.text_data import Columns, read_rows, score_of
from flexbert_core.schema import ConfigError, UserPath


def normalized(embeddings: Any) -> torch.Tensor:
    """Rows (N, D) as float64 of length 1; a row of zeros stays one."""
    wide = torch.as_tensor(np.asarray(embeddings), dtype=torch.float64)
    return torch.nn.functional.normalize(wide, dim=1, eps=1e-300)


def alignment(first: Any, second: Any, alpha: float = 2.0) -> float:
    """Mean over pairs of |f(x) - f(y)|^alpha (their section 4.1.1): 0 is perfect, 2 is what random directions have.
    first, second: (N, D), any lengths."""
    return float((normalized(first) - normalized(second)).norm(dim=1).pow(alpha).mean())


def uniformity(embeddings: Any, t: float = 2.0) -> float:
    """log of the mean over pairs of different texts of exp(-t |f(x) - f(y)|^2) (their section 4.1.2): the lower, the
    more uniform; 0 if all are alike, about -2 t for directions that are random in many dimensions."""
    return float(torch.pdist(normalized(embeddings)).square().mul(-t).exp().mean().log())


def mean_cosine(embeddings: Any) -> float:
    """Mean cosine of different texts: near 1 where all embeddings lie in a narrow cone (Ethayarajh 2019, arXiv
    1909.00512)."""
    unit = normalized(embeddings)
    count = len(unit)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (count * (count - 1)))


@EVALS.register("embeddings")
class Embeddings(CelledEval):
    """alignment of pairs that mean the same (lower is better), uniformity of texts (lower is better) and their mean
    cosine. A text that stands there twice counts once in the latter two."""

    class Config(EmbeddingConfig):
        data: UserPath | None = Field(
            default=None,
            description="a .tsv, .csv, .jsonl or .parquet file of pairs that mean the same",
        )
        first: str | int = Field(
            default=0, description="column of a pair's first text: number from 0 (no header), or name"
        )
        second: str | int = Field(default=1, description="column of its second text")
        score: str | int | None = Field(default=None, description="column of a number that says how alike a pair is")
        min_score: float | None = Field(default=None, description="pairs below it are none, only texts; of STS-B 4")
        pairs: int = Field(default=2000, ge=2, description="the first ones, at most; uniformity is over their texts")

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.data is None:
            raise ConfigError("give data=PATH, a file of pairs")
        if (config.score is None) != (config.min_score is None):
            raise ConfigError("score, min_score: give both, or none")
        rows = read_rows(Path(config.data), Columns(config.first, config.second, config.score))
        assert rows.pairs is not None
        self.digest = rows.digest
        self.pairs = list(zip(rows.texts, rows.pairs, strict=True))[: config.pairs]
        self.same = [self._is_same(label, number) for number, label in enumerate(rows.labels or (), 1)][: config.pairs]
        self.same = self.same or [True] * len(self.pairs)
        if not any(self.same):
            raise ConfigError(f"data: {config.data}: no pair has a score of {config.min_score:g} or more")
        if len({text for pair in self.pairs for text in pair}) < 2:
            raise ConfigError(f"data: {config.data}: holds a single text: uniformity needs two")

    def _is_same(self, label: Any, number: int) -> bool:
        return score_of(label, f"data: {self.config.data}: row {number}") >= float(self.config.min_score or 0.0)

    def cells(self, model: Model, results: Mapping[str, Any]) -> list[Cell]:
        settings = self.config.model_dump(include={"first", "second", "score", "min_score", "pairs"})
        return [Cell("all", {**settings, **embedding_settings(self.config), "data": self.digest})]

    def compute(self, cell: Cell, model: Model, out: Path) -> Any:
        embedder = EmbeddingModel(model.folder, self.config)
        texts = list(dict.fromkeys(text for pair in self.pairs for text in pair))
        embeddings, cut = embedder.embed(texts)
        place = {text: number for number, text in enumerate(texts)}

        def of(side: int) -> NDArray[np.float32]:
            pairs = (pair for pair, same in zip(self.pairs, self.same, strict=True) if same)
            return embeddings[[place[pair[side]] for pair in pairs]]

        return {
            "alignment": alignment(of(0), of(1)),
            "uniformity": uniformity(embeddings),
            "mean cosine": mean_cosine(embeddings),
            "pairs": sum(self.same),
            "texts": len(texts),
            "cut_texts": cut,
        }

    def scores(self, model: Model, results: Mapping[str, Any]) -> Scores:
        return {key: results["all"][key] for key in ("alignment", "uniformity", "mean cosine")}
