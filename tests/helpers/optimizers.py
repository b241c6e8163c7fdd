"""A tiny model, its gradients and its optimizers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flexbert import FlexBertConfig, FlexBertForMaskedLM, build
from recipe.slots import OPTIMIZERS

VOCABULARY = 40


def tiny(*, seed: int = 3, **options: Any) -> FlexBertForMaskedLM:
    """Two blocks of width 16 with fused queries, keys (fewer heads) and values, and a gated mlp."""
    attention = {"name": "multihead", "num_key_value_heads": 2, **options}
    config = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"intermediate_size": 24, "max_position_embeddings": 64, "attention": attention}
    return build(FlexBertConfig.from_dict(config), seed=seed)


def loss_of(model: FlexBertForMaskedLM, number: int) -> torch.Tensor:
    """Of batch `number`, three sequences of different lengths."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(5, VOCABULARY, (30,), generator=generator)
    bounds = torch.tensor([0, 11, 13, 30], dtype=torch.int32)
    labels = torch.where(torch.rand(30, generator=generator) < 0.4, ids, -100)
    loss = model(ids, bounds, 17, labels=labels).loss
    assert loss is not None
    return loss


def closure_of(model: FlexBertForMaskedLM, optimizer: torch.optim.Optimizer, number: int) -> Callable[[], Any]:
    """As Composer gives it to `step`: gradients exist only after it ran."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, number)
        loss.backward()
        return loss

    return closure


def make(name: str, model: nn.Module, lr: float = 0.01, **options: Any) -> torch.optim.Optimizer:
    return OPTIMIZERS.build(OPTIMIZERS.parse({"name": name, **options}), model=model, lr=lr)


def worst(model: nn.Module, other: nn.Module) -> float:
    """Largest absolute difference of two models' parameters."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


def gradient_of(name: str, shape: torch.Size, number: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number + sum(map(ord, name))))
