"""Slot `embedding`: from token ids to the residual stream.   T packed tokens, D hidden, V vocabulary."""

import math

from pydantic import Field
from torch import Tensor, nn

from flexbert.config import FlexBertConfig
from flexbert.dropout import Dropout
from flexbert.layers import build_norm
from flexbert.registry import EMBEDDINGS
from flexbert_core.schema import Component


@EMBEDDINGS.register("tokens")
class TokenEmbedding(nn.Module):
    """drop(norm(token + what the position adds + token type)).

    The row of pad_token_id is an ordinary row: packed batches hold no padding, so it is never looked up.
    """

    class Config(Component):
        scaled: bool = Field(
            False, description="multiply token embeddings by sqrt(hidden_size) (arXiv 1706.03762, sec. 3.4)"
        )
        token_types: int = Field(
            0, ge=0, le=2**16, description="rows of the table of token types (BERT: 2); 0: no such table"
        )
        norm: bool = Field(True, description="normalise the embeddings with the model's norm")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability of the embeddings")

    def __init__(self, config: Config, *, model: FlexBertConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = math.sqrt(model.hidden_size) if config.scaled else 1.0
        self.tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        self.types = nn.Embedding(config.token_types, model.hidden_size) if config.token_types else None
        self.norm = build_norm(model.norm, model.hidden_size) if config.norm else nn.Identity()
        self.dropout = Dropout(config.dropout)

    def forward(self, input_ids: Tensor, added: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        """(T,) int64 -> (T, D).

        added: (T, D), from the position, in any dtype. token_type_ids: (T,) int64; None: all 0, as in pretraining on
        single texts.
        Raises ValueError for token types of another shape, or that the model has no table for.
        """
        if token_type_ids is not None and token_type_ids.shape != input_ids.shape:
            raise ValueError(f"expected token_type_ids {tuple(input_ids.shape)}, got {tuple(token_type_ids.shape)}")
        hidden_states = self.tokens(input_ids)
        if self.config.scaled:
            hidden_states = hidden_states * self.scale
        if added is not None:
            hidden_states = (hidden_states + added).to(hidden_states.dtype)
        if self.types is not None:
            # One row for all tokens where none are given; looked up too, for modules and hooks in the table's place
            hidden_states = hidden_states + self.types(
                input_ids.new_zeros(1) if token_type_ids is None else token_type_ids
            )
        elif token_type_ids is not None:
            raise ValueError("token_type_ids: the model has no token types (embedding.token_types: 0): leave them out")
        return self.dropout(self.norm(hidden_states))
