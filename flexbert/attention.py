"""Slot `attention`.   T packed tokens, D hidden, N heads, K key-value heads, H head dim."""

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from flexbert.config import FlexBertConfig, ModelComponent
from flexbert.dropout import Dropout
from flexbert.kernels import AttentionPlan, Backend, attend
from flexbert.layers import Linear, OutputProjection, build_optional_norm
from flexbert.positions import Positions
from flexbert.registry import ATTENTIONS, NORMS
from flexbert.rotary import Rotation, rotate
from flexbert_core.schema import MAY_CHANGE


@ATTENTIONS.register("multihead")
class MultiHeadAttention(nn.Module):
    """Softmax attention inside each sequence; every n-th layer sees all of it, the others a window.

    It sees both sides of a token, unless the plan is causal.

    Wqkv rows are [N + 2K, H]: queries, keys, values, each head by head. Source: ModernBERT (arXiv 2412.13663, sec.
    2.1); fewer key-value heads: arXiv 2305.13245; norms of queries and keys: arXiv 2302.05442.
    """

    class Config(ModelComponent):
        global_attn_every_n_layers: int = Field(
            1,
            ge=1,
            description="layer i is global if i is a multiple of this, else local; 1: all global (ModernBERT: 3)",
        )
        window_per_side: int = Field(
            64,
            ge=1,
            le=2**24,
            description="tokens a local layer sees to the left and to the right of self (ModernBERT: 64)",
        )
        num_key_value_heads: int | None = Field(
            None, ge=1, description="heads of keys and values, each shared by a group of query heads; null: no sharing"
        )
        fused: bool = Field(True, description="one matrix Wqkv, not Wq, Wk and Wv: faster, the same function")
        qkv_bias: bool = Field(False, description="bias of the query, key and value projections")
        out_bias: bool = Field(False, description="bias of the output projection")
        qk_norm: Annotated[Any, *NORMS.slot(optional=True)] = Field(
            None, description="norm of each head's queries and keys, before positions; null: none"
        )
        inner_norm: Annotated[Any, *NORMS.slot(optional=True)] = Field(
            None, description="norm before Wo, as in sub-LN (arXiv 2210.06423); null: none"
        )
        probs_dropout: float = Field(
            0.0,
            ge=0,
            lt=1,
            description="dropout probability of attention weights; drawn inside the kernels, so, other than all other "
            "dropout, it depends on how a batch is split into microbatches and ranks",
        )
        out_dropout: float = Field(
            0.0,
            ge=0,
            lt=1,
            description="dropout probability after Wo, before the residual (ModernBERT training: 0.1)",
        )
        backend: Backend = Field(
            "auto",
            description="kernel: auto (chosen by device), eager, sdpa, tiled, flash2, flash3, torch_flash (without a "
            "package) or flex",
            json_schema_extra=MAY_CHANGE,
        )

        def check(self, model: FlexBertConfig) -> None:
            heads, shared = model.num_attention_heads, self.num_key_value_heads
            if shared is not None and heads % shared:
                near = [str(number) for number in range(1, heads + 1) if heads % number == 0]
                raise ValueError(
                    f"attention.num_key_value_heads: {shared} does not divide num_attention_heads {heads}: "
                    f"try {', '.join(near)}"
                )

        def unread(self, model: FlexBertConfig) -> list[str]:
            every, window = self.global_attn_every_n_layers, self.window_per_side
            layers = [index for index in range(model.num_hidden_layers) if model.layer(index).attention is self]
            if window == type(self).model_fields["window_per_side"].default or any(index % every for index in layers):
                return []
            return [f"window_per_side: {window}, but all layers are global: set global_attn_every_n_layers"]

    def __init__(self, config: Config, *, hidden_size: int, num_attention_heads: int, layer_index: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_attention_heads
        kv_heads = config.num_key_value_heads or num_attention_heads
        self.heads = (num_attention_heads, kv_heads, kv_heads)  # of queries, keys, values
        self.is_global = layer_index % config.global_attn_every_n_layers == 0
        self.window_size = (-1, -1) if self.is_global else (config.window_per_side, config.window_per_side)
        parts = tuple((heads, self.head_dim) for heads in self.heads)
        if config.fused:
            rows = sum(self.heads) * self.head_dim
            self.Wqkv = Linear(hidden_size, rows, bias=config.qkv_bias, outputs=parts)
        else:
            self.Wq, self.Wk, self.Wv = (
                Linear(hidden_size, part[0] * part[1], bias=config.qkv_bias, outputs=(part,)) for part in parts
            )
        self.q_norm = build_optional_norm(config.qk_norm, self.head_dim)
        self.k_norm = build_optional_norm(config.qk_norm, self.head_dim)
        self.inner_norm = build_optional_norm(config.inner_norm, hidden_size)
        self.inner_norm.output_parts = parts[:1]  # grows head by head, like the inputs of Wo
        self.Wo = OutputProjection(hidden_size, hidden_size, bias=config.out_bias, inputs=parts[:1])
        self.out_dropout = Dropout(config.out_dropout)

    selects_tokens: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    """Whether it sees nothing behind a token where `plan.causal` says so."""

    def forward(
        self, hidden_states: Tensor, plan: AttentionPlan, positions: Positions, wanted: Tensor | None = None
    ) -> Tensor:
        """(T, D) -> (T, D), or (M, D) of the tokens `wanted`, (M,) int64 and rising."""
        rotation = positions.global_layers if self.is_global else positions.local_layers
        queries, keys, values = self._project(hidden_states, rotation)
        attended = attend(
            queries,
            keys,
            values,
            plan,
            window_size=self.window_size,
            alibi_slopes=positions.alibi_slopes,
            dropout_p=self.config.probs_dropout if self.training else 0.0,
            backend=self.config.backend,
            wanted=wanted,
        )
        return self.out_dropout(self.Wo(self.inner_norm(attended.flatten(1))))

    def _project(self, hidden_states: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (T, N, H), keys and values (T, K, H), normed and turned."""
        if self.config.fused:
            rows = self.Wqkv(hidden_states).unflatten(-1, (-1, self.head_dim))
            if self.config.qk_norm is None:
                turning, values = rows.split((self.heads[0] + self.heads[1], self.heads[2]), dim=1)
                queries, keys = rotate(turning, rotation).split(self.heads[:2], dim=1)
                return queries, keys, values
            queries, keys, values = rows.split(self.heads, dim=1)
        else:
            queries, keys, values = (
                linear(hidden_states).unflatten(-1, (-1, self.head_dim)) for linear in (self.Wq, self.Wk, self.Wv)
            )
        return rotate(self.q_norm(queries), rotation), rotate(self.k_norm(keys), rotation), values
