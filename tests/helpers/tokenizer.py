"""Tokenizers of as many words as a model has ids, without a file."""

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")}


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    words = [*SPECIAL.values(), *(f"word{number}" for number in range(size - 5))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
