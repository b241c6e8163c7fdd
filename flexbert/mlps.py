"""Slot `mlp`: the feed-forward half of a block.   T packed tokens, D hidden, F intermediate."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flexbert.dropout import Dropout
from flexbert.layers import Linear, OutputProjection, build_optional_norm
from flexbert.registry import MLPS, NORMS, Activation, build_activation
from flexbert_core.schema import Component


class _Config(Component):
    in_bias: bool = Field(False, description="bias of the input projection Wi")
    out_bias: bool = Field(False, description="bias of the output projection Wo")
    inner_norm: Annotated[Any, *NORMS.slot(optional=True)] = Field(
        None, description="norm before Wo, as in sub-LN (arXiv 2210.06423); null: none"
    )
    inner_dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability between gate and Wo")
    out_dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability after Wo, before the residual sum")


@MLPS.register("glu")
class GatedLinearUnit(nn.Module):
    """Wo(drop(norm(act(a) * b))), [a|b] = Wi(x): the first half is activated (arXiv 2002.05202; ModernBERT).

    With `activated_half: second` it is a * act(b), as CrammingBERT, NomicBERT and GTE store their halves.
    """

    class Config(_Config):
        activation: Activation = Field(
            "gelu",
            description="of one half: gelu (exact erf form), silu, relu, sigmoid, identity, ... (slot activation)",
        )
        activated_half: Literal["first", "second"] = Field(
            "first", description="which rows of Wi the activation acts on; the other rows are the factor"
        )

    def __init__(self, config: Config, *, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.config = config
        self.activation = build_activation(config.activation)
        halves = ((intermediate_size,),) * 2
        self.Wi = Linear(hidden_size, 2 * intermediate_size, bias=config.in_bias, outputs=halves)
        self.inner_norm = build_optional_norm(config.inner_norm, intermediate_size)
        self.inner_dropout = Dropout(config.inner_dropout)
        self.Wo = OutputProjection(intermediate_size, hidden_size, bias=config.out_bias)
        self.out_dropout = Dropout(config.out_dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        inner = self.inner_norm(self._gated(hidden_states))
        return self.out_dropout(self.Wo(self.inner_dropout(inner)))

    def _gated(self, hidden_states: Tensor) -> Tensor:
        gate = 0 if self.config.activated_half == "first" else 1
        states = self.Wi(hidden_states)
        if (
            self.activation in _IN_PLACE and not torch.compiler.is_compiling()
        ):  # Inductor chooses by itself what to keep
            return _Gate.apply(states, self.activation, gate)  # pyright: ignore[reportReturnType]
        halves = states.chunk(2, dim=-1)
        return self.activation(halves[gate]) * halves[1 - gate]


_aten: Any = torch.ops.aten
# Torch's own, into memory that is there: (input, out) and (gradient, input, grad_input).
_IN_PLACE: dict[Any, tuple[Callable[..., Any], Callable[..., Any]]] = {
    F.gelu: (_aten.gelu.out, _aten.gelu_backward.grad_input),
    F.silu: (_aten.silu.out, _aten.silu_backward.grad_input),
}


class _Gate(torch.autograd.Function):
    """act(a) * b of [a|b] in either order. Keeps these only: act(a) is made again for the gradient, whose halves are
    written where they belong."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, activation: Callable[[Tensor], Tensor], gate: int) -> Tensor:
        ctx.save_for_backward(states)
        ctx.activation, ctx.gate = activation, gate
        halves = states.chunk(2, dim=-1)
        return activation(halves[gate]).mul_(halves[1 - gate])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (states,) = ctx.saved_tensors
        gradient = torch.empty_like(states)
        acted, factor = (states.chunk(2, dim=-1)[number] for number in (ctx.gate, 1 - ctx.gate))
        of_acted, of_factor = (gradient.chunk(2, dim=-1)[number] for number in (ctx.gate, 1 - ctx.gate))
        activate, backward = _IN_PLACE[ctx.activation]
        activate(acted, out=of_factor).mul_(gradients[0])
        torch.mul(gradients[0], factor, out=of_acted)
        backward(of_acted, acted, grad_input=of_acted)
        return gradient, None, None


@MLPS.register("mlp")
class MultiLayerPerceptron(nn.Module):
    """Wo(drop(norm(act(Wi(x))))): the plain one of BERT (arXiv 1810.04805), biases as configured."""

    class Config(_Config):
        activation: Activation = Field("gelu", description="gelu (exact erf form), relu, ... (slot activation)")

    def __init__(self, config: Config, *, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.config = config
        self.activation = build_activation(config.activation)
        self.Wi = Linear(hidden_size, intermediate_size, bias=config.in_bias)
        self.inner_norm = build_optional_norm(config.inner_norm, intermediate_size)
        self.inner_dropout = Dropout(config.inner_dropout)
        self.Wo = OutputProjection(intermediate_size, hidden_size, bias=config.out_bias)
        self.out_dropout = Dropout(config.out_dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        inner = self.inner_norm(self.activation(self.Wi(hidden_states)))
        return self.out_dropout(self.Wo(self.inner_dropout(inner)))
