"""Slot `attention`.   T packed tokens, D hidden, N heads, H head dim."""

from pydantic import Field
from torch import Tensor, nn

from flexbert.kernels import Backend, attend
from flexbert.layers import OutputProjection, dropout
from flexbert.plan import AttentionPlan
from flexbert.positions import Rotations, rotate
from flexbert.registry import ATTENTIONS
from schema import Component


@ATTENTIONS.register("multihead")
class MultiHeadAttention(nn.Module):
    """Bidirectional softmax attention inside each sequence; every n-th layer sees all of it, the others a window.

    Wqkv rows are [3, N, H]: queries, keys, values, each head by head. Source: ModernBERT (arXiv 2412.13663, sec. 2.1).
    """

    class Config(Component):
        global_attn_every_n_layers: int = Field(
            1,
            ge=1,
            description="layer i is global if i is a multiple of this, else local; 1: all global (ModernBERT: 3)",
        )
        window_per_side: int = Field(
            64,
            ge=1,
            description="tokens a local layer sees to the left and to the right of self (ModernBERT: 64)",
        )
        qkv_bias: bool = Field(False, description="bias of the fused query-key-value projection")
        out_bias: bool = Field(False, description="bias of the output projection")
        probs_dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability of attention weights")
        out_dropout: float = Field(
            0.0,
            ge=0,
            lt=1,
            description="dropout probability after Wo, before the residual (ModernBERT training: 0.1)",
        )
        backend: Backend = Field("auto", description="kernel: auto (chosen by device), eager, sdpa or flash2")

    def __init__(self, config: Config, *, hidden_size: int, num_attention_heads: int, layer_index: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_attention_heads
        self.is_global = layer_index % config.global_attn_every_n_layers == 0
        self.window_size = (-1, -1) if self.is_global else (config.window_per_side, config.window_per_side)
        self.Wqkv = nn.Linear(hidden_size, 3 * hidden_size, bias=config.qkv_bias)
        self.Wo = OutputProjection(hidden_size, hidden_size, bias=config.out_bias)

    def forward(self, hidden_states: Tensor, plan: AttentionPlan, rotations: Rotations) -> Tensor:
        """(T, D) -> (T, D)."""
        rotation = rotations.global_layers if self.is_global else rotations.local_layers
        queries, keys, values = self.Wqkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        attended = attend(
            rotate(queries, rotation),
            rotate(keys, rotation),
            values,
            plan,
            window_size=self.window_size,
            dropout_p=self.config.probs_dropout if self.training else 0.0,
            backend=self.config.backend,
        )
        return dropout(self.Wo(attended.flatten(1)), self.config.out_dropout, self.training)
