"""Minimal pairs in BLiMP's form: whether a model finds the good sentence likelier than the bad one."""

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import Field

from evals.corpora import digest_of_texts
from evals.interface import EVALS, Cell, CelledEval, Model, Scores
from evals.masked_models import LastMaskedModel, model_settings
from evals.pseudo_likelihood import PseudoConfig, pseudo_log_likelihoods
from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import ConfigError, UserPath

_SENTENCES = ("sentence_good", "sentence_bad")


@EVALS.register("minimal_pairs")
class MinimalPairs(CelledEval):
    """Accuracy: the share of pairs whose good sentence has the greater pseudo-log-likelihood, overall and by UID
    (BLiMP, Warstadt et al. 2020, arXiv 1912.00582). A tie counts as wrong."""

    class Config(PseudoConfig):
        data: UserPath | None = Field(
            default=None,
            description="a .jsonl file with sentence_good and sentence_bad, or a folder of them",
        )
        by: str = Field("UID", description="what groups pairs; where a row has none, its file's name does")
        pairs: int | None = Field(default=None, ge=1, description="of each group at most, its first; default: all")

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.data is None:
            raise ConfigError("give data=PATH, a .jsonl file of pairs, or a folder of them")
        self.groups: dict[str, list[tuple[str, str]]] = {}
        for file in _files(Path(config.data)):
            for group, pair in _pairs(file, config.by):
                mine = self.groups.setdefault(group, [])
                if config.pairs is None or len(mine) < config.pairs:
                    mine.append(pair)
        if not self.groups:
            raise ConfigError(f"data: {config.data}: holds no pairs")
        self._models = LastMaskedModel(config)

    def cells(self, model: Model, results: Mapping[str, Any]) -> list[Cell]:
        settings = {"method": self.config.method, **model_settings(self.config)}
        return [
            Cell(name, {**settings, "group": name, "data": digest_of_texts(list(chain(*pairs)))})
            for name, pairs in self.groups.items()
        ]

    def compute(self, cell: Cell, model: Model, out: Path) -> Any:
        """Raises RunError for a model without a masked-token head."""
        pairs = self.groups[cell.settings["group"]]
        texts = [sentence for pair in pairs for sentence in pair]
        found = pseudo_log_likelihoods(self._models.of(model), texts, self.config.method)
        likelihoods = [each.log_likelihood for each in found]
        right = [good > bad for good, bad in zip(likelihoods[::2], likelihoods[1::2], strict=True)]
        ties = sum(good == bad for good, bad in zip(likelihoods[::2], likelihoods[1::2], strict=True))
        return {
            "accuracy": sum(right) / len(right),
            "right": sum(right),
            "pairs": len(right),
            "ties": ties,
            "cut_sentences": sum(each.cut for each in found),
        }

    def scores(self, model: Model, results: Mapping[str, Any]) -> Scores:
        of_groups = {name: results[name] for name in self.groups}
        total = sum(each["right"] for each in of_groups.values()) / sum(each["pairs"] for each in of_groups.values())
        found = {"accuracy": total}
        return found if len(of_groups) == 1 else found | {name: each["accuracy"] for name, each in of_groups.items()}

    def scores_without_model(self) -> Mapping[str, Scores]:
        return {"guessing": {"accuracy": 0.5}}


def _plain(name: str) -> str:
    """A group's name as a file's."""
    return "".join(char if char.isalnum() or char in "-_." else "-" for char in name)


def _files(place: Path) -> list[Path]:
    if place.is_dir():
        files = sorted(place.glob("*.jsonl"))
        if not files:
            raise ConfigError(f"data: {place}: holds no .jsonl file")
        return files
    if not place.is_file():
        raise ConfigError(f"data: {place}: no such file or folder")
    return [place]


def _pairs(file: Path, by: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Group and (good, bad) of each row. Raises ConfigError naming the line."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is no UTF-8 text: {error.reason}, byte {error.start}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{file}:{number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{file}:{number}: expected an object, got {type(row).__name__}")
        for key in _SENTENCES:
            if not isinstance(row.get(key), str) or not row[key].strip():
                hint = "" if key in row else f": no such key, {did_you_mean(key, row)}"
                raise ConfigError(f"{file}:{number}: {key}: expected a sentence{hint}")
        yield _plain(str(row.get(by, file.stem))), (row["sentence_good"], row["sentence_bad"])
