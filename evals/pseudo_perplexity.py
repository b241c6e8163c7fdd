"""Pseudo-perplexity of sentences (Salazar et al. 2020, arXiv 1910.14659)."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from evals.corpora import CorpusConfig, digest_of_texts, read_corpora
from evals.interface import EVALS, Cell, CelledEval, Model, Scores
from evals.masked_models import LastMaskedModel, model_settings
from evals.pseudo_likelihood import PseudoConfig, pseudo_log_likelihoods
from flexbert_core.schema import ConfigError, RunError

_END = re.compile(r"(?<=[.!?])\s+|\n+")


@EVALS.register("pseudo_perplexity")
class PseudoPerplexity(CelledEval):
    """exp(-PLL / N), with PLL added over all sentences of a domain and N their tokens (their section 2.3), and
    nats/byte, -PLL by UTF-8 bytes without blanks, by which models of different tokenizers compare."""

    class Config(CorpusConfig, PseudoConfig):
        sentences: int = Field(
            default=100, ge=1, description="of each domain, its first; each costs a row for each token"
        )
        min_words: int = Field(default=4, ge=1, description="shorter sentences are left out: headings, numbers")
        max_words: int = Field(
            default=60, ge=1, description="longer sentences are left out: a row's cost grows with its square"
        )

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.sentences = {}
        for name, corpus in read_corpora(config).items():
            found = (" ".join(each.split()) for text in corpus.texts for each in _END.split(text))
            kept = [each for each in found if config.min_words <= len(each.split()) <= config.max_words]
            if not kept:
                raise ConfigError(f"{name}: has no sentence of {config.min_words} to {config.max_words} words")
            self.sentences[name] = kept[: config.sentences]
        self._models = LastMaskedModel(config)

    def cells(self, model: Model, results: Mapping[str, Any]) -> list[Cell]:
        settings = {"method": self.config.method, **model_settings(self.config)}
        return [
            Cell(name, {**settings, "domain": name, "data": digest_of_texts(sentences)})
            for name, sentences in self.sentences.items()
        ]

    def compute(self, cell: Cell, model: Model, out: Path) -> Any:
        """Raises RunError for a model without a masked-token head, or whose tokenizer knows none of the text."""
        masked = self._models.of(model)
        sentences = self.sentences[cell.settings["domain"]]
        found = pseudo_log_likelihoods(masked, sentences, self.config.method)
        nats, tokens = -math.fsum(each.log_likelihood for each in found), sum(each.tokens for each in found)
        if not tokens:
            raise RunError(f"{cell.name}: the tokenizer knows none of its tokens")
        num_bytes = sum(len("".join(sentence.split()).encode("utf-8", "surrogatepass")) for sentence in sentences)
        return {
            "pseudo-perplexity": math.exp(min(nats / tokens, 700.0)),  # beyond, there is no such float
            "nats/byte": nats / num_bytes,
            "nats": nats,
            "tokens": tokens,
            "sentences": len(sentences),
            "cut_sentences": sum(each.cut for each in found),
            "runtime": masked.runtime,
        }

    def scores(self, model: Model, results: Mapping[str, Any]) -> Scores:
        return {
            f"{name} {key}": results[name][key] for name in self.sentences for key in ("pseudo-perplexity", "nats/byte")
        }
