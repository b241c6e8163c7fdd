"""A tokenizer of real text, small folders of models that have it, and evaluations of them."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from evals.interface import EVALS, Model
from evals.models import digest_of
from flexbert import build, to_hf
from tests.helpers.models import tiny
from tests.helpers.tokenizer import SPECIAL

WORDS = ("the", "cat", "dog", "sat", "runs", "on", "mat", "paris", "berlin", "in", "sleep", "##s", "##ing", "and")
_LETTERS = "abcdefghijklmnopqrstuvwxyz.,!"
SENTENCES = (
    "The cat sat on the mat, and the dogs sleep.",
    "A dog runs in paris!",
    "Berlin and the cats sleeping on mats.",
    "the dog sat and the cat runs in berlin, on the mat.",
)


def text_tokenizer(words: tuple[str, ...] = WORDS) -> PreTrainedTokenizerFast:
    """WordPiece of letters and of some words; fewer words: more tokens for the same text."""
    entries = [*SPECIAL.values(), *_LETTERS, *(f"##{letter}" for letter in _LETTERS), *words]
    vocabulary = {entry: number for number, entry in enumerate(dict.fromkeys(entries))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.WordPiece()  # pyright: ignore[reportAttributeAccessIssue]
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def model_folder(folder: Path, seed: int = 0, words: tuple[str, ...] = WORDS, **changes: Any) -> Model:
    """A tiny model with random weights, exported; ModernBERT unless changes say otherwise."""
    to_hf(build(tiny(vocab_size=128, **changes), seed=seed), text_tokenizer(words), folder)
    return model_of(folder)


def model_of(folder: Path) -> Model:
    return Model(str(folder), folder.name, folder, digest_of(folder))


def evaluation(**config: Any) -> Any:
    """Of the entry that `name` names."""
    return EVALS.build(EVALS.parse(config))
