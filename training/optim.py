"""Slot `optimizer`, and the split of parameters into decayed and not decayed ones."""

from typing import Any

import torch
from pydantic import Field
from torch import nn

from schema import Component, Registry

OPTIMIZERS = Registry("optimizer")
"""An entry with `works_on_shards = True` makes right steps where a rank holds a part of each tensor; under
trainer.parallelism fsdp2 others are refused."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices with `weight_decay`; vectors (norm weights, biases) without, as in BERT and ModernBERT.

    Order within a group is the model's, so optimizer states map to names the same way in every process.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    plain = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class _AdamConfig(Component):
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the mean of gradients")
    beta2: float = Field(
        default=0.98, ge=0, lt=1, description="decay of the mean of squared gradients (ModernBERT: 0.98)"
    )
    eps: float = Field(default=1e-6, gt=0, description="added to the denominator (ModernBERT: 1e-6)")


@OPTIMIZERS.register("stableadamw")
class StableAdamW:
    """torch-optimi's StableAdamW: AdamW with Adafactor's update clipping (arXiv 2304.13013, algorithm 2)."""

    works_on_shards = True

    class Config(_AdamConfig):
        weight_decay: float = Field(
            default=1e-5, ge=0, description="matrices only; per step, see decouple_lr (ModernBERT: 1e-5)"
        )
        decouple_lr: bool = Field(
            default=True, description="decay by weight_decay * lr / peak lr a step, not by weight_decay * lr"
        )

    def __new__(cls, config: Config, *, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        from training.stable_adamw import ShardedStableAdamW as Implementation

        # optimi 0.3.3 picks Triton from an empty list of parameters, also on CPU, and crashes there: decide here.
        on_cuda = all(parameter.is_cuda for parameter in model.parameters())
        return Implementation(
            parameter_groups(model, config.weight_decay),
            lr=lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            decouple_lr=config.decouple_lr,
            max_lr=lr if config.decouple_lr else None,
            triton=on_cuda,
            foreach=False,
        )


@OPTIMIZERS.register("adamw")
class AdamW:
    """torch.optim.AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    works_on_shards = True

    class Config(_AdamConfig):
        weight_decay: float = Field(default=0.01, ge=0, description="matrices only; a step decays by weight_decay * lr")

    def __new__(cls, config: Config, *, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameter_groups(model, config.weight_decay), lr=lr, betas=(config.beta1, config.beta2), eps=config.eps
        )
