"""Slot `tokenizer`: whole words, the most frequent ones; all others are [UNK]."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from data.tokenizer import ROLES, TOKENIZERS, VOCAB_MULTIPLE
from flexbert_core.schema import Component, Count


@TOKENIZERS.register("words")
class Words:
    """Words between blanks and punctuation, trained on a sample of the training documents."""

    class Config(Component):
        name: Literal["words"] = "words"
        vocab_size: Annotated[int, Field(ge=64, multiple_of=VOCAB_MULTIPLE)] = 8192
        """Words, special tokens included."""
        sample_bytes: Count = 20_000_000
        """UTF-8 bytes of text to count words in."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def build(self, texts: Iterator[str]) -> tuple[Any, dict[str, str]]:
        """A `tokenizers.Tokenizer`, and the special token of each role. A pure function of the texts."""
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        names = {role: f"[{role.upper()}]" for role in ROLES}
        tokenizer = Tokenizer(models.WordLevel(unk_token=names["unk"]))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(
            vocab_size=self.config.vocab_size, special_tokens=list(names.values()), show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer, names
