"""Similarity of sentences by one vector each, without fine-tuning: Spearman's correlation with people's scores."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from evals.interface import EVALS, Eval, EvalConfig, Model, Scores
from evals.loading import precision_of
from evals.text_data import Columns, read_rows, score_of
from evals.text_scores import scored
from flexbert_core.schema import ConfigError, UserPath


@EVALS.register("sts")
class Sts(Eval):
    """Spearman's correlation of cosine similarities with scores, as STS-B has them: arXiv 1908.10084."""

    class Config(EvalConfig):
        data: UserPath | None = Field(
            default=None, description="a .tsv, .csv, .jsonl or .parquet file, such as STS-B's dev.tsv"
        )
        text: str | int = Field(
            default="sentence1", description="column of a sentence: its name, or number without a header"
        )
        pair: str | int = Field(default="sentence2", description="column of the other one")
        label: str | int = Field(default="score", description="column of the score")
        pooling: Literal["mean", "cls"] | None = Field(
            default=None, description="default: as the folder says (its modules.json), else mean"
        )
        max_length: int | None = Field(
            default=None, ge=8, description="tokens of a sentence; default: as the folder says"
        )
        batch_size: int = Field(default=32, ge=1, description="texts embedded at once")
        precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="auto: bf16 on a GPU")

        def packages(self) -> list[str]:
            return ["sentence_transformers"]

    config: Config
    version = 2

    def __init__(self, config: Config) -> None:
        # Resolved at once: results are keyed by the config.
        super().__init__(config.model_copy(update={"precision": precision_of(config.precision)}))
        if config.data is None:
            raise ConfigError("give data=FILE, such as STS-B's dev.tsv")
        file = Path(config.data)
        self.rows = read_rows(file, Columns(config.text, config.pair, config.label))
        self.labels = [
            score_of(label, f"{file}: row {number}: {config.label}")
            for number, label in enumerate(self.rows.labels or (), 1)
        ]

    def run(self, model: Model, out: Path) -> Scores:
        from evals.dense import SingleVector

        config = self.config
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder = SingleVector(model.folder, config.pooling, config.max_length, ("", ""), device, config.precision)
        sides = [encoder.embed(texts, False, config.batch_size) for texts in (self.rows.texts, self.rows.pairs or ())]
        cosines = (sides[0] * sides[1]).sum(1).tolist()
        return {"spearman": scored(["spearman"], self.labels, cosines)["spearman"]}
