"""Loss and accuracy of hidden tokens by domain and rate, on masks that are the same for every model."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from data.keyed import keyed_generator
from evals.corpora import CorpusConfig, pieces, read_corpora
from evals.interface import EVALS, Cell, CelledEval, Model, Scores, distinct
from evals.masked_models import Hidden, LastMaskedModel, MaskedModel, MaskedModelConfig, model_settings
from flexbert_core.schema import RunError

_WORD = re.compile(r"\S+")
_SUMS = ("nats", "tokens", "correct", "bytes")


@EVALS.register("masked")
class Masked(CelledEval):
    """Every hidden token becomes the mask token; none is replaced by another or left. Special and unknown tokens and
    blanks are never hidden. loss: nats a hidden token; nats/byte: the same sum by the UTF-8 bytes of what was hidden.

    Draws are keyed by (seed, domain, row), and those hidden at one rate are hidden at each higher one, too.
    """

    class Config(CorpusConfig, MaskedModelConfig):
        rates: list[Annotated[float, Field(gt=0, le=1)]] = Field(
            default=[0.15, 0.3, 0.4], min_length=1, description="shares that are hidden, as expected"
        )
        unit: Literal["tokens", "words"] = Field(
            default="tokens", description="what is hidden; words: the same text for models of different tokenizers"
        )
        rows: int = Field(default=256, ge=1, description="pieces of text of each domain, at most")
        words: int = Field(default=200, ge=1, description="of a piece, as blanks part them")
        seed: int = Field(default=0, ge=0, description="of the masks")

        @model_validator(mode="after")
        def _check(self) -> Any:
            distinct("rates", self.rates)
            return self

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.corpora = read_corpora(config)
        self.rows = {name: pieces(each.texts, config.words, config.rows) for name, each in self.corpora.items()}
        self._models = LastMaskedModel(config)

    def cells(self, model: Model, results: Mapping[str, Any]) -> list[Cell]:
        settings = self.config.model_dump(include={"unit", "rows", "words", "seed"}) | model_settings(self.config)
        return [
            Cell(f"{name}/rate{rate:g}", {**settings, "domain": name, "rate": rate, "data": corpus.digest})
            for name, corpus in self.corpora.items()
            for rate in self.config.rates
        ]

    def compute(self, cell: Cell, model: Model, out: Path) -> Any:
        """Sums over hidden tokens. Raises RunError where none is hidden, and for a model without a masked-token
        head."""
        domain, rate = cell.settings["domain"], cell.settings["rate"]
        masked = self._models.of(model)
        texts = self.rows[domain]
        encoded = masked.encode(texts)
        hidden, num_bytes, cut = [], 0, 0
        for number, text in enumerate(texts):
            row, hidden_bytes, whole = self._hide(masked, encoded, number, text, domain, rate)
            cut += not whole
            if row is not None:
                hidden.append(row)
                num_bytes += hidden_bytes
        if not hidden:
            raise RunError(f"{domain}: no token of it is hidden at rate {rate:g}: raise rows")
        scores = masked.scores(hidden)
        nats = -math.fsum(value for values, _ in scores for value in values)
        tokens, correct = sum(len(values) for values, _ in scores), sum(sum(hits) for _, hits in scores)
        return {
            "loss": nats / tokens,
            "nats/byte": nats / num_bytes,
            "accuracy": correct / tokens,
            **dict(zip(_SUMS, (nats, tokens, correct, num_bytes), strict=True)),
            "rows": len(hidden),
            "cut_rows": cut,
            "runtime": masked.runtime,
        }

    def _hide(
        self, masked: MaskedModel, encoded: Any, number: int, text: str, domain: str, rate: float
    ) -> tuple[Hidden | None, int, bool]:
        """A row with its hidden tokens, None without any; the bytes of what is hidden; whether all of the text is
        there."""
        ids, offsets = list(encoded["input_ids"][number]), encoded["offset_mapping"][number]
        generator = keyed_generator(self.config.seed, f"masked evaluation, {self.config.unit}, {domain}", number)
        real = [at for at, each in enumerate(ids) if each not in masked.special and text[slice(*offsets[at])].strip()]
        if self.config.unit == "tokens":
            draws = generator.random(len(ids))
            chosen = [at for at in real if draws[at] < rate]
            covered = {place for at in chosen for place in range(*offsets[at]) if not text[place].isspace()}
        else:
            spans = [match.span() for match in _WORD.finditer(text)]
            draws = generator.random(len(spans))
            wanted = {place for span, draw in zip(spans, draws, strict=True) if draw < rate for place in range(*span)}
            chosen = [at for at in real if not wanted.isdisjoint(range(*offsets[at]))]
            seen = {place for at in real for place in range(*offsets[at])}
            covered = wanted & seen
        end = max((offsets[at][1] for at in real), default=0)
        whole = not text[end:].strip()
        if not chosen:
            return None, 0, whole
        targets = [ids[at] for at in chosen]
        for at in chosen:
            ids[at] = masked.mask_token_id
        hidden_bytes = len("".join(text[place] for place in sorted(covered)).encode("utf-8", "surrogatepass"))
        return Hidden(ids, chosen, targets), hidden_bytes, whole

    def scores(self, model: Model, results: Mapping[str, Any]) -> Scores:
        """Over all hidden tokens of all domains, and of each."""
        rates = self.config.rates
        found: dict[str, Any] = {}
        if len(self.corpora) > 1:
            for rate in rates:
                found |= _columns(f"all {rate:g}", [results[f"{name}/rate{rate:g}"] for name in self.corpora])
        for name in self.corpora:
            for rate in rates:
                found |= _columns(f"{name} {rate:g}", [results[f"{name}/rate{rate:g}"]])
        return found


def _columns(name: str, parts: list[Mapping[str, Any]]) -> dict[str, float]:
    nats, tokens, correct, num_bytes = (math.fsum(part[key] for part in parts) for key in _SUMS)
    return {
        f"{name} loss": nats / tokens,
        f"{name} nats/byte": nats / num_bytes,
        f"{name} accuracy": correct / tokens,
    }
