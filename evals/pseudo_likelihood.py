"""How likely a masked language model finds a sentence: each of its tokens hidden in turn, log-probabilities added."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from evals.masked_models import Hidden, MaskedModel, MaskedModelConfig

Method = Literal["token", "word_l2r"]


class PseudoConfig(MaskedModelConfig):
    """What evaluations by pseudo-log-likelihood say."""

    method: Method = Field(
        default="word_l2r",
        description="token: each token by itself (Salazar et al. 2020); word_l2r: with it those of its word that come "
        "after it (Kauf & Ivanova 2023), so that the rest of a long word does not give it away",
    )


@dataclass(frozen=True)
class Pseudo:
    """Of a sentence: its pseudo-log-likelihood in nats, over its tokens but special ones; whether it was cut."""

    log_likelihood: float
    tokens: int
    cut: bool


def hidden_rows(
    input_ids: Sequence[int], words: Sequence[int | None], special: set[int], mask_token_id: int, method: Method
) -> list[Hidden]:
    """A row for each token that is not special, with it hidden and, by `word_l2r`, the later ones of its word.

    words: the number of the word that each token is of, as the tokenizer parts words; None of special ones. Only the
    token itself is asked for. (Salazar et al. 2020, arXiv 1910.14659, section 2: PLL(W) = sum over t of
    log P(w_t | W without t); Kauf & Ivanova 2023, arXiv 2305.10588, section 3.)
    """
    rows = []
    for at, target in enumerate(input_ids):
        if words[at] is None or target in special:
            continue
        ids = list(input_ids)
        ids[at] = mask_token_id
        if method == "word_l2r":
            for later in range(at + 1, len(ids)):
                if words[later] != words[at]:
                    break
                ids[later] = mask_token_id
        rows.append(Hidden(ids, [at], [target]))
    return rows


def pseudo_log_likelihoods(masked: MaskedModel, texts: Sequence[str], method: Method) -> list[Pseudo]:
    """Of each text. Unknown tokens are left out of the sum, as special ones are. Texts of the same tokens are computed
    once: rounding must not tell them apart."""
    encoded = masked.encode(texts)
    rows: list[Hidden] = []
    places: dict[tuple[int, ...], range] = {}
    for number, ids in enumerate(encoded["input_ids"]):
        if tuple(ids) not in places:
            words = encoded.word_ids(number)
            mine = hidden_rows(ids, words, masked.special, masked.mask_token_id, method)
            places[tuple(ids)] = range(len(rows), len(rows) + len(mine))
            rows += mine
    scores = masked.scores(rows)
    found = []
    for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        mine = places[tuple(ids)]
        total = math.fsum(scores[row][0][0] for row in mine)
        end = max((stop for _, stop in offsets), default=0)
        found.append(Pseudo(total, len(mine), bool(text[end:].strip())))
    return found
