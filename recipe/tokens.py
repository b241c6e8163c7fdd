"""How a run goes on from a model whose tokenizer is not quite its own: the run file's `tokens`."""

from typing import Literal

from pydantic import Field

from flexbert_core.schema import Schema, UserPath


class TokensConfig(Schema):
    """Rows of the token table, the decoder and its bias where data.tokenizer has tokens that the model of `from` lacks.

    Rows of tokens that both have are the model's own, to the bit.
    """

    add: UserPath | None = Field(
        default=None,
        description="the file that prepare's tokenizer.add was given: refused unless data.tokenizer has each of its "
        "tokens; default: whatever data.tokenizer has more than the model's tokenizer",
    )
    init: Literal["mean-of-pieces", "mean", "normal"] = Field(
        default="mean-of-pieces",
        description="what a new token starts as: the mean of the pieces that the model's tokenizer splits it into; the "
        "mean of all tokens; or a draw, by `seed`, with mean and deviation of all tokens in each column (the bias is "
        "the mean)",
    )
    other_tokenizer: bool = Field(
        default=False,
        description="data.tokenizer is another one than the model's: tokens that both have keep their rows, at their "
        "new ids, and all others are new; false: refused",
    )
