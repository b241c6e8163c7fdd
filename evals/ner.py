"""Named entities, and any tagging of words: fine-tuning of a token classifier, scored by entities.

A word's tag is predicted at its first token (Devlin et al. 2019, arXiv 1810.04805, section 5.3); words that the length
cuts off, or that the tokenizer drops, count as tagged O.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from data.keyed import torch_seed
from evals.batching import by_length
from evals.classifiers import Encoded, load_tokenizer, longest
from evals.conll import TaggedSentences, read_conll
from evals.entities import entity_scores
from evals.finetuning import IGNORE, Plan, Split, autocast, fine_tune
from evals.interface import EVALS, Cell, CelledEval, EvalConfig, Model, Scores
from evals.loading import Precision, precision_of
from evals.results import over_seeds
from evals.taggers import load_tagger
from flexbert_core.schema import ConfigError, RunError, UserPath
from recipe.slots import OPTIMIZERS


@EVALS.register("ner")
class Ner(CelledEval):
    """Entity-level precision, recall and F1, equal to conlleval's and seqeval's, at the epoch with the best F1."""

    class Config(EvalConfig):
        data: UserPath | None = Field(
            default=None,
            description="a folder with column files: a word and its tag (BIO, IOB1, BIOES) a line",
        )
        train: str = Field("train.txt", description="its file to train on")
        dev: str = Field("dev.txt", description="its file to score by")
        word_column: int = Field(default=0, description="column of the word, from 0")
        tag_column: int = Field(default=-1, description="column of the tag, from 0; -1: the last")
        seeds: list[Annotated[int, Field(ge=0)]] = Field(
            default=[0, 1, 2], min_length=1, description="one training for each"
        )
        lr: float = Field(default=5e-5, gt=0, description="peak learning rate")
        weight_decay: float = Field(default=1e-5, ge=0, description="as the optimizer understands it")
        epochs: int = Field(default=3, ge=1, description="of training")
        batch_size: int = Field(default=32, ge=1, description="sentences a step")
        max_length: int = Field(
            default=256, ge=8, description="tokens of a sentence at most; longer ones are cut, and counted"
        )
        warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps over which lr rises")
        optimizer: Annotated[Any, *OPTIMIZERS.slot()] = Field(
            default="stableadamw", description="with weight_decay above"
        )
        runtime: Literal["flexbert", "transformers"] | None = Field(
            default=None,
            description="default: ours, unpadded, for architectures that it knows, else transformers, padded",
        )
        precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="auto: bf16 on a GPU")
        microbatch_tokens: int = Field(default=16384, ge=1, description="slots at once in a step, which bounds memory")

    config: Config
    version = 2
    """2: sentences are encoded as text, not word by word."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.data is None:
            raise ConfigError("give data=PATH, a folder with column files")
        if len(set(config.seeds)) != len(config.seeds):
            raise ConfigError(f"seeds: a value stands there twice: {config.seeds}")
        folder = Path(config.data)
        self.train, self.dev = (
            read_conll(folder / name, config.word_column, config.tag_column) for name in (config.train, config.dev)
        )
        self.classes = sorted({"O", *(tag for tags in self.train.tags for tag in tags)})
        if self.classes == ["O"]:
            raise ConfigError(f"{folder / config.train}: every word is tagged O: is it column {config.tag_column}?")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision: Precision = precision_of(config.precision)

    def cells(self, model: Model, results: Mapping[str, Any]) -> list[Cell]:
        names = ("lr", "weight_decay", "epochs", "batch_size", "max_length", "warmup", "runtime", "microbatch_tokens")
        settings = {name: getattr(self.config, name) for name in names}
        settings |= {"optimizer": self.config.optimizer.model_dump(), "precision": self.precision}
        settings |= {"train": self.train.digest, "dev": self.dev.digest}
        settings |= {"columns": [self.config.word_column, self.config.tag_column]}
        return [Cell(f"seed{seed}", {**settings, "seed": seed}, f"seed{seed}") for seed in self.config.seeds]

    def compute(self, cell: Cell, model: Model, out: Path) -> Any:
        config, seed = self.config, cell.settings["seed"]
        tokenizer = load_tokenizer(model.folder)
        if not tokenizer.is_fast:
            raise RunError(f"{model.folder}: its tokenizer has no tokenizer.json, which tells which word a token is of")
        most = min(config.max_length, longest(model.folder, tokenizer))
        train, _ = _encoded(tokenizer, self.train, self.classes, most)
        dev, cut = _encoded(tokenizer, self.dev, self.classes, most)
        plan = Plan(
            lr=config.lr,
            epochs=config.epochs,
            batch_size=config.batch_size,
            seed=seed,
            optimizer=config.optimizer.model_copy(update={"weight_decay": config.weight_decay}),
            warmup=config.warmup,
            early_stopping=None,
            microbatch_tokens=config.microbatch_tokens,
            precision=self.precision,
        )
        tagger = load_tagger(
            model.folder, len(self.classes), torch_seed(seed, "fine-tuning head"), self.device, config.runtime
        )

        def score(current: Any) -> dict[str, Any]:
            found = entity_scores(self.dev.tags, self._tags(current, dev))
            return {**found, "score": found["f1"]}

        result, _ = fine_tune(tagger, train, score, plan, "tokens", self.device)
        return {**result, "cut_sentences": cut, "runtime": tagger.runtime}

    @torch.no_grad()
    def _tags(self, tagger: Any, dev: Split) -> list[list[str]]:
        """Of each word of each sentence of the dev set."""
        tagger.eval()
        found = [["O"] * len(words) for words in self.dev.words]
        for part in by_length([len(row.input_ids) for row in dev.rows], self.config.microbatch_tokens):
            with autocast(self.device, self.precision):
                logits = tagger.logits([dev.rows[row] for row in part], None).float().cpu()
            if not bool(logits.isfinite().all()):
                raise RunError("the model's scores are no numbers")
            best = logits.argmax(1).split([len(dev.rows[row].input_ids) for row in part])
            for row, classes in zip(part, best, strict=True):
                for at, word in dev.rows[row].first_tokens:  # pyright: ignore[reportAttributeAccessIssue]
                    found[row][word] = self.classes[int(classes[at])]
        return found

    def scores(self, model: Model, results: Mapping[str, Any]) -> Scores:
        cells = [results[f"seed{seed}"] for seed in self.config.seeds]
        found: dict[str, Any] = {
            key: over_seeds([cell[key] for cell in cells]) for key in ("f1", "precision", "recall")
        }
        kinds = sorted({kind for cell in cells for kind in cell["types"]})
        if len(kinds) > 1:
            for kind in kinds:
                found[f"f1 {kind}"] = over_seeds([cell["types"].get(kind, {"f1": 0.0})["f1"] for cell in cells])
        return found


class _Sentence(Encoded):
    """first_tokens: (token, word) where a word begins."""

    __slots__ = ("first_tokens",)

    def __init__(self, input_ids: list[int], first_tokens: list[tuple[int, int]]) -> None:
        super().__init__(input_ids, None)
        self.first_tokens = first_tokens


def _encoded(tokenizer: Any, sentences: TaggedSentences, classes: Sequence[str], most: int) -> tuple[Split, int]:
    """Rows with a label at each word's first token, -100 elsewhere, and how many sentences were cut. A tag that is no
    class (of the dev set only) has none.

    Words are encoded as the text that they make: one by one, byte-level BPE would see no spaces between them.
    """
    numbers = {tag: number for number, tag in enumerate(classes)}
    tokenizer.backend_tokenizer.no_padding()
    texts = [" ".join(words) for words in sentences.words]
    batch = tokenizer(texts, truncation=True, max_length=most, return_offsets_mapping=True, padding=False)
    rows, labels, cut = [], [], 0
    for number, tags in enumerate(sentences.tags):
        ids = batch["input_ids"][number]
        firsts = _first_tokens(sentences.words[number], batch["offset_mapping"][number])
        row = [IGNORE] * len(ids)
        for at, word in firsts:
            row[at] = numbers.get(tags[word], IGNORE)
        rows.append(_Sentence(list(ids), firsts))
        labels.append(row)
        cut += len(ids) == most and max((word for _, word in firsts), default=-1) < len(tags) - 1
    tokenizer.backend_tokenizer.no_truncation()
    return Split(rows, labels), cut


def _first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(token, word) where a word begins. offsets: of the tokens in the words joined by spaces; a token may hold the
    space before its word, and a word may have no token."""
    word_at: list[int | None] = []
    for word, letters in enumerate(words):
        word_at += [*[word] * len(letters), None]
    found: dict[int, int] = {}
    for token, (start, end) in enumerate(offsets):
        word = next((each for each in word_at[start:end] if each is not None), None)
        if word is not None:
            found.setdefault(word, token)
    return [(token, word) for word, token in found.items()]
