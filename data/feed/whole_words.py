"""Masking `words`: whole words are selected, never parts of them."""

import numpy as np
from numpy.typing import NDArray

from data.feed.masking import MASKINGS, SELECT, HidingConfig, Targets, Vocabulary, hide
from data.feed.philox import RowNames, draws


@MASKINGS.register("words")
class WordMasking:
    """Each word is selected by itself, with all its tokens (BERT's whole word masking, google-research/bert of May
    2019; arXiv 1906.08101). [MASK], a random token or the token itself is drawn for each token, as there.

    Departure: BERT shuffles the words of a row until 15 % of its tokens are selected. Here each word is drawn alone, so
    the share holds on average; what is selected of one word does not hang on others.
    """

    class Config(HidingConfig):
        pass

    def __init__(self, config: Config, *, vocabulary: Vocabulary) -> None:
        """Raises ValueError for a tokenizer that does not tell where words begin."""
        self.config, self.vocabulary, self.words = config, vocabulary, vocabulary.words

    def mask(self, input_ids: NDArray[np.unsignedinteger], row_ends: NDArray[np.int64], rows: RowNames) -> Targets:
        """The draw of a word's first token decides for the word."""
        first = self.words.first_tokens(input_ids, row_ends)
        selected = (draws(row_ends, rows, SELECT) < self.config.rate * 2.0**32)[first]
        return hide(input_ids, row_ends, rows, selected, self.config, self.vocabulary)
