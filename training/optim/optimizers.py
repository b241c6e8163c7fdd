"""Slot `optimizer`, and the split of parameters into decayed and not decayed ones."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from flexbert.layers import block_matrices
from flexbert_core.schema import Component
from recipe.slots import OPTIMIZERS

Decayed = Literal["matrices", "no_embeddings", "all"]


class _Config(Component):
    weight_decay: float = Field(ge=0)  # default and meaning are each entry's own
    decayed: Decayed = Field(
        default="matrices",
        description="what decays: matrices (BERT, ModernBERT), those that are no embeddings, or all, vectors too",
    )


class _AdamConfig(_Config):
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the mean of gradients")
    beta2: float = Field(
        default=0.98, ge=0, lt=1, description="decay of the mean of squared gradients (ModernBERT: 0.98)"
    )
    eps: float = Field(default=1e-6, gt=0, description="added to the denominator (ModernBERT: 1e-6)")


def parameter_groups(model: nn.Module, config: _Config, skip: Iterable[nn.Parameter] = ()) -> list[dict[str, Any]]:
    """At most two groups: decayed ones with the config's `weight_decay`, the others with 0.

    Vectors are norm weights and biases; a decoder tied to the token table is an embedding. skip: parameters to leave
    out. Order within a group is the model's, so optimizer states map to names the same way in every process.
    """
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    spared = {"matrices": set(), "no_embeddings": tables, "all": set()}[config.decayed]
    skipped, decayed, plain = set(skip), [], []
    for parameter in model.parameters():
        if parameter.requires_grad and parameter not in skipped:
            decays = (parameter.ndim > 1 or config.decayed == "all") and parameter not in spared
            (decayed if decays else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@OPTIMIZERS.register("stableadamw")
class StableAdamW:
    """torch-optimi's StableAdamW: AdamW with Adafactor's update clipping (arXiv 2304.13013, algorithm 2)."""

    works_on_shards = True

    class Config(_AdamConfig):
        weight_decay: float = Field(
            default=1e-5, ge=0, description="of what `decayed` says; per step, see decouple_lr (ModernBERT: 1e-5)"
        )
        decouple_lr: bool = Field(
            default=True, description="decay by weight_decay * lr / peak lr a step, not by weight_decay * lr"
        )

    def __new__(cls, config: Config, *, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        from training.optim.stable_adamw import ShardedStableAdamW as Implementation

        return Implementation(
            parameter_groups(model, config),
            lr=lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            decouple_lr=config.decouple_lr,
            max_lr=lr if config.decouple_lr else None,
            triton=False,  # 0.3.3 would pick it from an empty list of parameters; on CUDA see there
            foreach=False,
        )


@OPTIMIZERS.register("adamw")
class AdamW:
    """torch.optim.AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    works_on_shards = True

    class Config(_AdamConfig):
        weight_decay: float = Field(default=0.01, ge=0, description="a step decays by weight_decay * lr")

    def __new__(cls, config: Config, *, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameter_groups(model, config), lr=lr, betas=(config.beta1, config.beta2), eps=config.eps
        )


@OPTIMIZERS.register("decoupled_adamw")
class DecoupledAdamW:
    """AdamW whose decay has the shape of the learning rate but not its size, as Composer's DecoupledAdamW."""

    works_on_shards = True

    class Config(_AdamConfig):
        weight_decay: float = Field(
            default=1e-5,
            ge=0,
            description="a step decays by weight_decay * lr / peak lr of the phase (MosaicBERT: 1e-5)",
        )

    def __new__(cls, config: Config, *, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return _Decoupled(parameter_groups(model, config), lr=lr, betas=(config.beta1, config.beta2), eps=config.eps)


class _Decoupled(torch.optim.AdamW):
    """Groups hold the decay at the peak, and `max_lr`, the peak, which callbacks/schedule.py keeps up to date."""

    def __init__(self, params: Any, lr: float, **options: Any) -> None:
        super().__init__(params, lr=lr, **options)
        self.defaults["max_lr"] = lr
        for group in self.param_groups:
            group["max_lr"] = lr

    def step(self, closure: Any = None) -> Any:
        """torch's AdamW decays by lr * weight_decay: for the time of the step, the decay is over the peak."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            group["weight_decay"] /= group["max_lr"]
        try:
            return super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay


@OPTIMIZERS.register("muon")
class Muon:
    """Muon for the matrices in the blocks, AdamW for all else: embeddings, head, vectors. See muon.py."""

    works_on_shards = True

    class Config(_AdamConfig):
        weight_decay: float = Field(
            default=0.1, ge=0, description="a step decays by weight_decay * lr (Moonlight: 0.1)"
        )
        momentum: float = Field(default=0.95, ge=0, lt=1, description="of matrices' gradients, Nesterov's (Muon: 0.95)")
        adjust_lr: Literal["match_rms_adamw", "original"] = Field(
            default="match_rms_adamw",
            description="size of a matrix's step: as AdamW's, so that AdamW's lr fits (Moonlight); original: spectral "
            "norm sqrt(max(1, rows / columns)) * lr, which wants lr near 0.02 and adamw_lr_factor near 0.015",
        )
        adamw_lr_factor: float = Field(default=1.0, gt=0, description="learning rate of the AdamW part over `lr`")

    def __new__(cls, config: Config, *, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        from training.optim.muon import MuonWithAdamW

        matrices = block_matrices(model)
        return MuonWithAdamW(
            matrices,
            parameter_groups(model, config, skip=matrices),
            lr=lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            adjust_lr=config.adjust_lr,
            adamw_lr_factor=config.adamw_lr_factor,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
        )
