"""Slot `block`: how attention and mlp are joined to the residual stream.   T packed tokens, M of them wanted, D hidden.

A block with `selects_tokens` takes `wanted`, (M,) int64 and rising, and then gives the states of these tokens only:
pretraining reads the last block's at masked tokens. It needs an attention with the same. Others run whole.
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from flexbert.config import FlexBertConfig, ModelComponent
from flexbert.kernels import AttentionPlan
from flexbert.layers import add_residual, build_norm
from flexbert.positions import Positions
from flexbert.registry import ATTENTIONS, BLOCKS, MLPS
from flexbert_core.schema import Component


def _attention(model: FlexBertConfig, layer_index: int) -> nn.Module:
    return ATTENTIONS.build(
        model.attention,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        layer_index=layer_index,
    )


def _mlp(model: FlexBertConfig) -> nn.Module:
    return MLPS.build(model.mlp, hidden_size=model.hidden_size, intermediate_size=model.intermediate_size)


def _norm(model: FlexBertConfig) -> nn.Module:
    return build_norm(model.norm, model.hidden_size)


def _select(hidden_states: Tensor, wanted: Tensor | None) -> Tensor:
    return hidden_states if wanted is None else hidden_states.index_select(0, wanted)


def _selects_tokens(attention: nn.Module) -> bool:
    return getattr(attention, "selects_tokens", False)


def _attended(
    attention: nn.Module, hidden_states: Tensor, plan: AttentionPlan, positions: Positions, wanted: Tensor | None
) -> Tensor:
    if wanted is None:  # an attention from outside may not know the argument
        return attention(hidden_states, plan, positions)
    return attention(hidden_states, plan, positions, wanted)


class _FirstNormConfig(ModelComponent):
    """Of blocks that normalise what attention reads."""

    skip_first_attention_norm: bool = Field(
        True, description="no attention norm in layer 0: the embedding norm has just run (ModernBERT)"
    )

    def check(self, model: FlexBertConfig) -> None:
        in_layer_0 = model.layer(0).block is self  # initial layers may have another block
        if self.skip_first_attention_norm and in_layer_0 and not getattr(model.embedding, "norm", False):
            raise ValueError(
                "block.skip_first_attention_norm: leaves layer 0 without any norm, since the embedding has none: "
                "set embedding.norm to true or this to false"
            )


@BLOCKS.register("prenorm")
class PreNormBlock(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)).

    The stream itself is never normalised, so the encoder ends with a norm of its own.
    """

    needs_final_norm: ClassVar[bool] = True

    class Config(_FirstNormConfig):
        pass

    def __init__(self, config: Config, *, model: FlexBertConfig, layer_index: int) -> None:
        super().__init__()
        skip = layer_index == 0 and config.skip_first_attention_norm
        self.attn_norm = nn.Identity() if skip else _norm(model)
        self.attn = _attention(model, layer_index)
        self.selects_tokens = _selects_tokens(self.attn)
        self.mlp_norm = _norm(model)
        self.mlp = _mlp(model)

    def forward(
        self, hidden_states: Tensor, plan: AttentionPlan, positions: Positions, wanted: Tensor | None = None
    ) -> Tensor:
        """(T, D) -> (T, D), or (M, D) of the tokens `wanted`."""
        attended = _attended(self.attn, self.attn_norm(hidden_states), plan, positions, wanted)
        hidden_states = add_residual(_select(hidden_states, wanted), attended)
        return add_residual(hidden_states, self.mlp(self.mlp_norm(hidden_states)))


@BLOCKS.register("postnorm")
class PostNormBlock(nn.Module):
    """x = norm(x + attention(x)); x = norm(x + mlp(x)) (arXiv 1706.03762; BERT)."""

    needs_final_norm: ClassVar[bool] = False

    class Config(Component):
        pass

    def __init__(self, config: Config, *, model: FlexBertConfig, layer_index: int) -> None:
        super().__init__()
        self.attn = _attention(model, layer_index)
        self.selects_tokens = _selects_tokens(self.attn)
        self.attn_norm = _norm(model)
        self.mlp = _mlp(model)
        self.mlp_norm = _norm(model)

    def forward(
        self, hidden_states: Tensor, plan: AttentionPlan, positions: Positions, wanted: Tensor | None = None
    ) -> Tensor:
        """(T, D) -> (T, D), or (M, D) of the tokens `wanted`."""
        attended = _attended(self.attn, hidden_states, plan, positions, wanted)
        hidden_states = self.attn_norm(add_residual(_select(hidden_states, wanted), attended))
        return self.mlp_norm(add_residual(hidden_states, self.mlp(hidden_states)))


@BLOCKS.register("parallel")
class ParallelBlock(nn.Module):
    """y = norm(x); x += attention(y) + mlp(y) (GPT-J; PaLM, arXiv 2204.02311)."""

    needs_final_norm: ClassVar[bool] = True

    class Config(_FirstNormConfig):
        pass

    def __init__(self, config: Config, *, model: FlexBertConfig, layer_index: int) -> None:
        super().__init__()
        skip = layer_index == 0 and config.skip_first_attention_norm
        self.norm = nn.Identity() if skip else _norm(model)
        self.attn = _attention(model, layer_index)
        self.selects_tokens = _selects_tokens(self.attn)
        self.mlp = _mlp(model)

    def forward(
        self, hidden_states: Tensor, plan: AttentionPlan, positions: Positions, wanted: Tensor | None = None
    ) -> Tensor:
        """(T, D) -> (T, D), or (M, D) of the tokens `wanted`."""
        normed = self.norm(hidden_states)
        attended = _attended(self.attn, normed, plan, positions, wanted)
        hidden_states = add_residual(_select(hidden_states, wanted), attended)
        return add_residual(hidden_states, self.mlp(_select(normed, wanted)))


@BLOCKS.register("sandwich")
class SandwichBlock(nn.Module):
    """x += norm(attention(norm(x))); x += norm(mlp(norm(x))) (CogView, arXiv 2105.13290, sec. 2.4).

    Sub-LN is another thing: a block `prenorm` with `attention.inner_norm` and `mlp.inner_norm`.
    """

    needs_final_norm: ClassVar[bool] = True

    class Config(Component):
        pass

    def __init__(self, config: Config, *, model: FlexBertConfig, layer_index: int) -> None:
        super().__init__()
        self.attn_norm, self.attn, self.attn_out_norm = _norm(model), _attention(model, layer_index), _norm(model)
        self.selects_tokens = _selects_tokens(self.attn)
        self.mlp_norm, self.mlp, self.mlp_out_norm = _norm(model), _mlp(model), _norm(model)

    def forward(
        self, hidden_states: Tensor, plan: AttentionPlan, positions: Positions, wanted: Tensor | None = None
    ) -> Tensor:
        """(T, D) -> (T, D), or (M, D) of the tokens `wanted`."""
        attended = _attended(self.attn, self.attn_norm(hidden_states), plan, positions, wanted)
        hidden_states = add_residual(_select(hidden_states, wanted), self.attn_out_norm(attended))
        return add_residual(hidden_states, self.mlp_out_norm(self.mlp(self.mlp_norm(hidden_states))))
