"""Masking `spans`: runs of neighbouring words are selected together (SpanBERT, arXiv 1907.10529, section 3.1)."""

import numba
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from data.feed.masking import MASKINGS, SPANS, HidingConfig, Targets, Vocabulary, hide
from data.feed.philox import RowNames, philox4x32


@MASKINGS.register("spans")
class SpanMasking:
    """Spans begin at words drawn without order and have a geometric number of words, until `rate` of a row's tokens is
    selected. All tokens of a span have one fate: [MASK], random tokens, or themselves.

    Lengths are drawn from p (1 - p)^(n - 1) for n up to `longest`, made to add up to 1: so SpanBERT's code reads
    "clipped", and so the mean is the 3.8 words that the paper states. A span ends with its document, or at a special
    token. Departures: the last word of a row's budget is selected with the chance that makes the share exact on
    average, where SpanBERT cuts it; the budget is that of a row, for a row holds several documents.
    """

    class Config(HidingConfig):
        p: float = Field(default=0.2, gt=0, le=1, description="a span goes on with probability 1 - p (SpanBERT: 0.2)")
        longest: int = Field(default=10, ge=1, le=255, description="words that a span has at most (SpanBERT: 10)")
        whole_words: bool = Field(
            default=True, description="false: spans of tokens, for tokenizers that do not tell where words begin"
        )

    def __init__(self, config: Config, *, vocabulary: Vocabulary) -> None:
        """Raises ValueError for whole words of a tokenizer that does not tell where they begin."""
        self.config, self.vocabulary = config, vocabulary
        self.words = vocabulary.words if config.whole_words else None
        up_to = 1 - (1 - config.p) ** np.arange(1, config.longest)
        whole = 1 - (1 - config.p) ** config.longest
        self.longer = np.round(up_to / whole * 2.0**32).astype(np.uint64)
        """Of the draw of a span's length: it has n + 1 words and more from entry n - 1 on, (longest - 1,)."""

    def mask(self, input_ids: NDArray[np.unsignedinteger], row_ends: NDArray[np.int64], rows: RowNames) -> Targets:
        count = len(input_ids)
        if self.words is None:
            begins = np.arange(count)
        else:
            begins = np.flatnonzero(self.words.first_tokens(input_ids, row_ends) == np.arange(count))
        stops = np.append(begins[1:], count)
        kept = ~self.vocabulary.special[input_ids[begins]]  # a special token is a word of its own
        begins, stops = begins[kept], stops[kept]
        last_words = np.searchsorted(begins, row_ends)
        span = np.full(count, -1, np.int64)
        _select(begins, stops, last_words, rows.key, rows.number, self.config.rate, self.longer, span)
        return hide(input_ids, row_ends, rows, span >= 0, self.config, self.vocabulary, span)


@numba.njit(cache=True)
def _select(
    begins: NDArray[np.int64],
    stops: NDArray[np.int64],
    last_words: NDArray[np.int64],
    keys: NDArray[np.uint64],
    numbers: NDArray[np.uint32],
    rate: float,
    longer: NDArray[np.uint64],
    span: NDArray[np.int64],
) -> None:
    """Write to each selected token where its span begins. begins, stops: of the words that may be selected, (words,);
    last_words: (rows,), how many of them there are up to the end of each row."""
    first = 0
    for row in range(len(last_words)):
        last = last_words[row]
        order = np.arange(first, last)
        tokens = 0
        for word in range(first, last):
            tokens += stops[word] - begins[word]
        budget, taken, done = rate * tokens, 0, False
        for turn in range(last - first):
            place, length, chance, _ = philox4x32(
                np.uint32(turn), numbers[row], np.uint32(SPANS), np.uint32(0), keys[row]
            )
            # Words come in the order of a shuffle (Fisher and Yates), which needs no second try.
            other = turn + np.int64((np.uint64(place) * np.uint64(last - first - turn)) >> np.uint64(32))
            order[turn], order[other] = order[other], order[turn]
            start = order[turn]
            if span[begins[start]] >= 0:
                continue
            words = 1
            for threshold in longer:
                words += np.uint64(length) >= threshold
            for word in range(start, min(start + words, last)):
                if word > start and begins[word] != stops[word - 1]:
                    break
                if span[begins[word]] >= 0:
                    continue
                size = stops[word] - begins[word]
                done = taken + size > budget
                if done and chance * size >= (budget - taken) * 2.0**32:
                    break
                span[begins[word] : stops[word]] = begins[start]
                taken += size
                if done:
                    break
            if done:
                break
        first = last
