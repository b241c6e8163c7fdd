"""Slot `attention`: every token sees the mean of its document, whatever stands where."""

import torch
from torch import Tensor, nn

from flexbert import register
from flexbert.kernels.plan import AttentionPlan
from flexbert.layers import Linear, OutputProjection
from flexbert.positions import Positions
from flexbert_core.schema import Component


@register("attention", "mean")
class MeanAttention(nn.Module):
    """Wo(mean of Wv(x) over the token's document): attention whose weights are all alike."""

    class Config(Component):
        pass

    def __init__(self, config: Config, *, hidden_size: int, num_attention_heads: int, layer_index: int) -> None:
        super().__init__()
        self.Wv = Linear(hidden_size, hidden_size, bias=False)
        self.Wo = OutputProjection(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, plan: AttentionPlan, positions: Positions) -> Tensor:
        """(T, D) -> (T, D). The plan knows the documents' borders; a token must not see over its own."""
        values = self.Wv(hidden_states)
        lengths = plan.cu_seqlens.diff().clamp_min(1)
        sums = values.new_zeros(len(lengths), values.shape[1]).index_add(0, plan.sequence_ids, values)
        means = sums / lengths[:, None].to(values.dtype)
        return self.Wo(torch.index_select(means, 0, plan.sequence_ids))
