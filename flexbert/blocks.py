"""Slot `block`: how attention and mlp are joined to the residual stream.   T packed tokens, D hidden."""

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from torch import Tensor, nn

from flexbert.layers import build_norm
from flexbert.plan import AttentionPlan
from flexbert.positions import Rotations
from flexbert.registry import ATTENTIONS, BLOCKS, MLPS, ModelComponent

if TYPE_CHECKING:
    from flexbert.config import FlexBertConfig


@BLOCKS.register("prenorm")
class PreNormBlock(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)).

    The stream itself is never normalised, so the encoder ends with a norm of its own.
    """

    needs_final_norm: ClassVar[bool] = True

    class Config(ModelComponent):
        skip_first_attention_norm: bool = Field(
            True, description="no attention norm in layer 0: the embedding norm has just run (ModernBERT)"
        )

        def check(self, model: "FlexBertConfig") -> None:
            if self.skip_first_attention_norm and not getattr(model.embedding, "norm", False):
                raise ValueError(
                    "block.skip_first_attention_norm: leaves layer 0 without any norm, since the embedding has none: "
                    "set embedding.norm to true or this to false"
                )

    def __init__(self, config: Config, *, model: "FlexBertConfig", layer_index: int) -> None:
        super().__init__()
        skip = layer_index == 0 and config.skip_first_attention_norm
        self.attn_norm = nn.Identity() if skip else build_norm(model.norm, model.hidden_size)
        self.attn = ATTENTIONS.build(
            model.attention,
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_attention_heads,
            layer_index=layer_index,
        )
        self.mlp_norm = build_norm(model.norm, model.hidden_size)
        self.mlp = MLPS.build(model.mlp, hidden_size=model.hidden_size, intermediate_size=model.intermediate_size)

    def forward(self, hidden_states: Tensor, plan: AttentionPlan, rotations: Rotations) -> Tensor:
        """(T, D) -> (T, D)."""
        hidden_states = hidden_states + self.attn(self.attn_norm(hidden_states), plan, rotations)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))
