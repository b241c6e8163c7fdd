"""How far a model reaches: a fact somewhere in a long text, said again with its number masked at one end.

The model restores the number if it attends to the other place, so no fine-tuning is needed: a needle in a haystack
(github.com/gkamradt/LLMTest_NeedleInAHaystack) for masked language models. B texts at once, K numbers to choose from.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from data.keyed import keyed_generator
from evals.beir import read_corpus
from evals.classifiers import load_tokenizer, longest
from evals.interface import EVALS, LONGER, Cell, CelledEval, EvalConfig, Model, Scores
from evals.loading import precision_of
from evals.masked_reader import MaskedReader
from flexbert_core.schema import ConfigError, RunError, UserPath

_FACT = " The pass code of {name} is {number}."
_FEWEST = 8  # numbers to choose from
NAMES = ("amber", "bridge", "castle", "dark", "field", "garden", "hill", "iron", "lake", "old", "river", "stone")
"""Words of which two name what a fact is about."""


@EVALS.register("needle")
class Needle(CelledEval):
    """Accuracy of restoring a number that a text says once more, by length of the text and depth in it; the guess is
    among all numbers of as many tokens, so that one without any reach scores `chance`."""

    class Config(EvalConfig):
        data: UserPath | None = Field(
            default=None,
            description="what texts are made of: a folder in BEIR's layout, a .txt file, or a folder of them",
        )
        lengths: list[Annotated[int, Field(ge=64)]] = Field(
            default=[512, 1024, 2048, 4096, 8192],
            min_length=1,
            description="tokens; those beyond the model's are left out, and with them `accuracy`, the mean over all",
        )
        depths: int = Field(
            default=11, ge=2, description="places of the fact, evenly from the text's begin (0) to its end (1)"
        )
        texts: int = Field(default=10, ge=1, description="of each length and depth")
        ask: list[Literal["end", "start"]] = Field(
            default=["end", "start"], min_length=1, description="where the number is masked: behind the text, before it"
        )
        microbatch_tokens: int = Field(default=16384, ge=1, description="slots at once, which bounds memory")
        precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="auto: bf16 on a GPU")
        seed: int = Field(default=0, ge=0, description="of texts, facts and numbers")

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.data is None:
            raise ConfigError("give data=FOLDER, what texts are made of: in BEIR's layout, or of .txt files")
        for key in ("lengths", "ask"):
            values = getattr(config, key)
            if len(set(values)) != len(values):
                raise ConfigError(f"{key}: a value stands there twice: {values}")
        self.texts, self.digest = _texts(Path(config.data))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = precision_of(config.precision)

    @property
    def depths(self) -> list[float]:
        return [place / (self.config.depths - 1) for place in range(self.config.depths)]

    def cells(self, model: Model, results: Mapping[str, Any]) -> list[Cell]:
        most = longest(model.folder, load_tokenizer(model.folder))
        lengths = [length for length in self.config.lengths if length <= most] or [most]
        common = {"depths": self.config.depths, "texts": self.config.texts, "seed": self.config.seed}
        common |= {"precision": self.precision, "data": self.digest}
        return [
            Cell(f"{ask}-{length}", {**common, "ask": ask, "length": length}, ask)
            for ask, length in itertools.product(self.config.ask, lengths)
        ]

    def compute(self, cell: Cell, model: Model, out: Path) -> Any:
        ask, length = cell.settings["ask"], cell.settings["length"]
        tokenizer = load_tokenizer(model.folder)
        facts = Facts(tokenizer)
        stream = self._stream(tokenizer, length)
        reader = MaskedReader(model.folder, self.device, self.precision)
        hits: dict[float, int] = {}
        for depth in self.depths:
            rows, places, answers = [], [], []
            for number in range(self.config.texts):
                draw = keyed_generator(self.config.seed, f"needle {ask} {depth}", length, number)
                row, place, answer = facts.text(draw, stream, length, depth, ask)
                rows.append(row)
                places.append(place)
                answers.append(answer)
            found: list[int] = []
            step = max(1, self.config.microbatch_tokens // length)
            for first in range(0, len(rows), step):
                part = slice(first, first + step)
                found += reader.choose(rows[part], places[part], facts.answers)
            hits[depth] = sum(given == wanted for given, wanted in zip(found, answers, strict=True))
        accuracy = sum(hits.values()) / (len(hits) * self.config.texts)
        by_depth = {f"{depth:.4g}": count / self.config.texts for depth, count in hits.items()}
        return {"accuracy": accuracy, "chance": 1 / len(facts.answers), "runtime": reader.runtime, "depths": by_depth}

    def _stream(self, tokenizer: Any, length: int) -> np.ndarray:
        """Tokens of the texts, one after the other and from the begin again, until a text of this length fits twice."""
        ids: list[int] = []
        for text in itertools.cycle(self.texts):
            ids += tokenizer(" " + text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= 64 * length or (len(ids) >= 2 * length and text is self.texts[-1]):
                return np.asarray(ids)
        raise AssertionError("texts are never empty")

    def scores(self, model: Model, results: Mapping[str, Any]) -> Scores:
        from scipy.stats import binomtest

        found: dict[str, Any] = {}
        count = self.config.depths * self.config.texts
        for name, result in results.items():
            ask, length = name.split("-")
            between = binomtest(round(result["accuracy"] * count), count).proportion_ci(method="wilson")
            score = {"mean": result["accuracy"], "best": result["accuracy"], "deviation": None, "seeds": 1}
            found[f"asked at the {ask}, {length} tokens"] = {**score, "low": between.low, "high": between.high}
        wanted = list(itertools.product(self.config.ask, self.config.lengths))
        left_out = [(ask, length) for ask, length in wanted if f"{ask}-{length}" not in results]
        found |= {f"asked at the {ask}, {length} tokens": LONGER for ask, length in left_out}
        if not left_out:  # else means of models would be over other lengths
            found["accuracy"] = math.fsum(result["accuracy"] for result in results.values()) / len(results)
        found["chance"] = next(iter(results.values()))["chance"]
        return found

    def compare(self, results: Mapping[str, Mapping[str, Any]], out: Path) -> list[str]:
        """Draws accuracy by length and depth, a panel for each model and end."""
        draw_depths(results, self.config.ask, self.depths, out / "needle.png")
        return [f"accuracy by length and depth: {out / 'needle.png'}"]


class Facts:
    """Texts with a fact in them, of one tokenizer.

    answers: the tokens to choose from, one for each number that the tokenizer writes with a token of its own.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Raises RunError for a tokenizer that masks nothing, or has no tokens of numbers."""
        if tokenizer.mask_token_id is None:
            raise RunError("its tokenizer has no mask token, with which numbers are hidden")
        self._tokenizer = tokenizer
        # Numbers of two digits where they are tokens, else of one.
        for numbers in (range(10, 100), range(10)):
            self._numbers = self._with_tokens(numbers)
            if len(self._numbers) >= _FEWEST:
                break
        else:
            raise RunError(f"its tokenizer has tokens for {len(self._numbers)} digits only: none can be asked for")
        self.answers = list(self._numbers.values())

    def _with_tokens(self, numbers: Sequence[int]) -> dict[int, int]:
        """Those whose facts differ in one token, the same for all, and that token."""
        written = {number: self._ids("x", number) for number in numbers}
        shortest = min(map(len, written.values()))
        written = {number: ids for number, ids in written.items() if len(ids) == shortest}
        varied = [place for place, column in enumerate(zip(*written.values(), strict=True)) if len(set(column)) > 1]
        if len(varied) != 1:
            return {}
        found = {number: ids[varied[0]] for number, ids in written.items()}
        return {number: token for number, token in found.items() if token != self._tokenizer.unk_token_id}

    def _ids(self, name: str, number: int) -> list[int]:
        text = _FACT.format(name=name, number=number)
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def text(
        self, draw: np.random.Generator, stream: np.ndarray, length: int, depth: float, ask: str
    ) -> tuple[list[int], int, int]:
        """Its tokens, of this length, the place of the mask, and the number of the answer among `answers`.

        stream: tokens to draw a stretch from. Raises RunError for a length without room for the fact.
        """
        name = " ".join(NAMES[word] for word in draw.integers(len(NAMES), size=2))
        answer = int(draw.integers(len(self.answers)))
        numbers = list(self._numbers)
        fact, other = self._ids(name, numbers[answer]), self._ids(name, numbers[answer - 1])
        place = next(place for place, (one, two) in enumerate(zip(fact, other, strict=True)) if one != two)
        question = [*fact[:place], self._tokenizer.mask_token_id, *fact[place + 1 :]]
        left = length - 2 - len(fact) - len(question)
        if left < 0:
            raise RunError(f"lengths: {length} tokens have no room for a fact of {len(fact)} and its question")
        start = int(draw.integers(len(stream) - left))
        around, cut = stream[start : start + left].tolist(), round(depth * left)
        body = [*around[:cut], *fact, *around[cut:]]
        first, last = self._tokenizer.cls_token_id, self._tokenizer.sep_token_id
        if ask == "end":
            return [first, *body, *question, last], 1 + len(body) + place, answer
        return [first, *question, *body, last], 1 + place, answer


def draw_depths(
    results: Mapping[str, Mapping[str, Any]], asked: Sequence[str], depths: Sequence[float], picture: Path
) -> None:
    """A panel for each model and end: a column for each length, a row for each depth, coloured by accuracy."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(results), len(asked), figsize=(1 + 4.2 * len(asked), 0.8 + 3.2 * len(results)), dpi=110, squeeze=False
    )
    for row, (label, of_cells) in enumerate(results.items()):
        for column, ask in enumerate(asked):
            axis = axes[row, column]
            lengths = sorted(int(name.split("-")[1]) for name in of_cells if name.startswith(ask))
            table = [[of_cells[f"{ask}-{length}"]["depths"][f"{depth:.4g}"] for length in lengths] for depth in depths]
            image = axis.imshow(table, vmin=0, vmax=1, aspect="auto", cmap="RdYlGn")
            axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axis.set_yticks(range(len(depths)), [f"{depth:.2g}" for depth in depths])
            axis.set_title(f"{label}, asked at the {ask}", fontsize=9)
            axis.set_xlabel("tokens")
            axis.set_ylabel("depth of the fact")
            figure.colorbar(image, ax=axis, label="accuracy")
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)
    plt.close(figure)


def _texts(place: Path) -> tuple[list[str], str]:
    """What lies there, and its hash."""
    import hashlib

    if (place / "corpus.jsonl").is_file():
        texts = list(read_corpus(place / "corpus.jsonl").values())
    else:
        files = sorted(place.glob("*.txt")) if place.is_dir() else [place]
        if not files or not files[0].is_file():
            raise ConfigError(f"data: {place}: no corpus.jsonl and no .txt file there")
        try:
            texts = [file.read_text(encoding="utf-8") for file in files]
        except UnicodeDecodeError as error:
            raise ConfigError(f"data: {place}: is no UTF-8 text: {error.reason}, byte {error.start}") from None
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ConfigError(f"data: {place}: holds no text")
    return texts, hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
