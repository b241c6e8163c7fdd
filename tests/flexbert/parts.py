"""A part from outside for each slot of the library; importing this registers them."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flexbert import FlexBertConfig, register
from flexbert.heads import Head, TaskConfig, TaskHead
from flexbert.kernels import AttentionPlan
from flexbert.layers import OutputProjection
from flexbert.losses import TokenScores
from flexbert.positions import Position, Positions
from flexbert.registry import ATTENTIONS, MLPS
from flexbert_core.schema import Component


@register("norm", "test_scale")
class Scale(nn.Module):
    class Config(Component):
        start: float = Field(1.0, gt=0)

    def __init__(self, config: Config, *, hidden_size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((hidden_size,), config.start))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.scale / hidden_states.norm(dim=-1, keepdim=True).clamp_min(1e-3)


@register("mlp", "test_relu")
class Relu(nn.Module):
    class Config(Component):
        pass

    def __init__(self, config: Config, *, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.first = nn.Linear(hidden_size, intermediate_size)
        self.second = OutputProjection(intermediate_size, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.second(self.first(hidden_states).relu())


@register("activation", "test_sine")
def sine(states: Tensor) -> Tensor:
    return states.sin()


@register("embedding", "test_bigram")
class Bigram(nn.Module):
    class Config(Component):
        buckets: int = Field(64, ge=1)

    def __init__(self, config: Config, *, model: FlexBertConfig) -> None:
        super().__init__()
        self.buckets = config.buckets
        self.tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        self.bigrams = nn.Embedding(config.buckets, model.hidden_size)

    def forward(self, input_ids: Tensor, added: Tensor | None = None, token_type_ids: Tensor | None = None) -> Tensor:
        pairs = (input_ids * 31 + input_ids.roll(1)) % self.buckets
        states = self.tokens(input_ids) + self.bigrams(pairs)
        return states if added is None else states + added


@register("position", "test_ramp")
class Ramp(Position):
    class Config(Component):
        slope: float = Field(0.01, gt=0)

    def __init__(self, config: Config, *, model: FlexBertConfig) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.full((model.hidden_size,), config.slope))

    def embed(self, position_ids: Tensor, max_seqlen: int) -> Tensor:
        return position_ids[:, None] * self.direction


@register("attention", "test_mean")
class MeanOfSequence(nn.Module):
    class Config(Component):
        pass

    def __init__(self, config: Config, *, hidden_size: int, num_attention_heads: int, layer_index: int) -> None:
        super().__init__()
        self.out = OutputProjection(hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor, plan: AttentionPlan, positions: Positions) -> Tensor:
        same = plan.dense_visible((-1, -1)).to(hidden_states)
        return self.out(same @ hidden_states / same.sum(1, keepdim=True))


@register("block", "test_gated")
class Gated(nn.Module):
    needs_final_norm = True

    class Config(Component):
        pass

    def __init__(self, config: Config, *, model: FlexBertConfig, layer_index: int) -> None:
        super().__init__()
        sizes = {"hidden_size": model.hidden_size}
        self.gate = nn.Parameter(torch.ones(2))
        heads = model.num_attention_heads
        self.attn = ATTENTIONS.build(model.attention, **sizes, num_attention_heads=heads, layer_index=layer_index)
        self.mlp = MLPS.build(model.mlp, **sizes, intermediate_size=model.intermediate_size)

    def forward(self, hidden_states: Tensor, plan: AttentionPlan, positions: Positions) -> Tensor:
        hidden_states = hidden_states + self.gate[0] * self.attn(hidden_states, plan, positions)
        return hidden_states + self.gate[1] * self.mlp(hidden_states)


@register("head", "test_narrow")
class Narrow(Head):
    class Config(Component):
        width: int = Field(8, ge=1)

    def __init__(self, config: Config, *, model: FlexBertConfig) -> None:
        super().__init__()
        self.down = nn.Linear(model.hidden_size, config.width)
        self.up = nn.Linear(config.width, model.vocab_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down(hidden_states)

    def decoder(self, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.up.weight, self.up.bias


@register("head", "test_last")
class LastToken(TaskHead):
    task = "classification"

    class Config(TaskConfig):
        pass

    def __init__(self, config: Config, *, model: FlexBertConfig) -> None:
        super().__init__()
        self.classifier = nn.Linear(model.hidden_size, config.num_labels)

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.classifier(hidden_states[cu_seqlens[1:].long() - 1])


@register("loss", "test_focal")
class Focal:
    class Config(Component):
        gamma: float = Field(2.0, ge=0)

    def __init__(self, config: Config) -> None:
        self.gamma = config.gamma

    def __call__(
        self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scores: TokenScores
    ) -> Tensor:
        logits = F.linear(hidden_states, weight, bias)
        nll = F.cross_entropy(logits, targets, reduction="none")
        scores.losses.copy_(nll.detach())
        scores.hits.copy_(logits.argmax(1) == targets)
        return ((1 - torch.exp(-nll)) ** self.gamma * nll).sum()


@register("init", "test_constant")
class Constant:
    class Config(Component):
        value: float = Field(0.5)

    def __init__(self, config: Config, *, num_hidden_layers: int) -> None:
        self.value = config.value

    def __call__(self, module: nn.Module, seed: int, prefix: str = "") -> None:
        for child in module.modules():
            if isinstance(child, nn.Linear) and not child.weight.is_meta:
                nn.init.eye_(child.weight)
                child.weight.data.mul_(self.value)


@register("head", "test_parameter")
class ParameterDecoder(Head):
    class Config(Component):
        pass

    def __init__(self, config: Config, *, model: FlexBertConfig) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(model.vocab_size, model.hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def decoder(self, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.table, None
