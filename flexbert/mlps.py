"""Slot `mlp`: the feed-forward half of a block.   T packed tokens, D hidden, F intermediate."""

from pydantic import Field
from torch import Tensor, nn

from flexbert.layers import ACTIVATIONS, Activation, OutputProjection, dropout
from flexbert.registry import MLPS
from schema import Component


@MLPS.register("glu")
class GatedLinearUnit(nn.Module):
    """Wo(drop(act(a) * b)), [a|b] = Wi(x): the first half is activated (Shazeer 2020, arXiv 2002.05202; ModernBERT)."""

    class Config(Component):
        activation: Activation = Field("gelu", description="gelu (exact erf form) or silu, on the first half")
        in_bias: bool = Field(False, description="bias of the input projection Wi")
        out_bias: bool = Field(False, description="bias of the output projection Wo")
        inner_dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability between gate and Wo")
        out_dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability after Wo, before the residual sum")

    def __init__(self, config: Config, *, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.config = config
        self.activation = ACTIVATIONS[config.activation]
        self.Wi = nn.Linear(hidden_size, 2 * intermediate_size, bias=config.in_bias)
        self.Wo = OutputProjection(intermediate_size, hidden_size, bias=config.out_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        activated, gate = self.Wi(hidden_states).chunk(2, dim=-1)
        inner = dropout(self.activation(activated) * gate, self.config.inner_dropout, self.training)
        return dropout(self.Wo(inner), self.config.out_dropout, self.training)
