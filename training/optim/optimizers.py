"""Slot `optimizer`: the shelf."""

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from flexbert.layers import block_matrices
from recipe.slots import OPTIMIZERS
from training.optim.groups import GroupsConfig, parameter_groups


class _AdamConfig(GroupsConfig):
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
            default=1e-5, ge=0, description="of what `decayed` says; per step, see decouple_lr (ModernBERT: 1e-5)"
        )
        decouple_lr: bool = Field(
            default=True, description="decay by weight_decay * lr / peak lr a step, not by weight_decay * lr"
        )

        @property
        def decoupled(self) -> bool:
            return self.decouple_lr

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

        @property
        def decoupled(self) -> bool:
            return True

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


@OPTIMIZERS.register("lion")
class Lion:
    """torch-optimi's Lion (Chen et al. 2023, arXiv 2302.06675, program 1): steps of one size, in the direction of the
    sign. It keeps one number for each parameter, where AdamW keeps two; lr is 3 to 10 times less than AdamW's, and
    weight_decay as much more (section 5)."""

    works_on_shards = True

    class Config(GroupsConfig):
        weight_decay: float = Field(default=0.1, ge=0, description="a step decays by weight_decay * lr")
        beta1: float = Field(default=0.9, ge=0, lt=1, description="share of the mean in the direction of a step")
        beta2: float = Field(default=0.99, ge=0, lt=1, description="decay of the mean of gradients (Lion: 0.99)")

    def __new__(cls, config: Config, *, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        from optimi import Lion as Implementation

        groups, betas = parameter_groups(model, config), (config.beta1, config.beta2)
        return Implementation(groups, lr=lr, betas=betas, triton=False, foreach=False)


class _MuonConfig(_AdamConfig):
    weight_decay: float = Field(default=0.1, ge=0, description="a step decays by weight_decay * lr (Moonlight: 0.1)")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="of matrices' gradients, Nesterov's (Muon: 0.95)")
    adjust_lr: Literal["match_rms_adamw", "original"] = Field(
        default="match_rms_adamw",
        description="size of a matrix's step: as AdamW's, so that AdamW's lr fits (Moonlight); original: spectral "
        "norm sqrt(max(1, rows / columns)) * lr, which wants lr near 0.02 and adamw_lr_factor near 0.015",
    )
    adamw_lr_factor: float = Field(default=1.0, gt=0, description="learning rate of the AdamW part over `lr`")

    @model_validator(mode="after")
    def _check_size(self) -> "_MuonConfig":
        if self.scale_lr is not None and self.adjust_lr == "original":
            raise ValueError("scale_lr: adjust_lr original has steps of one size for every width already: leave it out")
        return self


@OPTIMIZERS.register("muon")
class Muon:
    """Muon for the matrices in the blocks, AdamW for all else: embeddings, head, vectors. See muon.py."""

    works_on_shards = True

    class Config(_MuonConfig):
        pass

    def __new__(cls, config: Config, *, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        from training.optim.muon import Muon as Implementation

        return Implementation(model, config, block_matrices(model), **_muon_options(config, lr))


@OPTIMIZERS.register("normuon")
class NorMuon:
    """Muon with steps of one size for each row, which is the step of one output (arXiv 2510.05491). See muon.py."""

    works_on_shards = True

    class Config(_MuonConfig):
        row_beta: float = Field(
            default=0.95, ge=0, lt=1, description="decay of the mean square of each row's steps (NorMuon: 0.95)"
        )

    def __new__(cls, config: Config, *, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        from training.optim.muon import NorMuon as Implementation

        options = _muon_options(config, lr)
        return Implementation(model, config, block_matrices(model), **options, row_beta=config.row_beta)


def _muon_options(config: _MuonConfig, lr: float) -> dict[str, Any]:
    return {
        "lr": lr,
        "momentum": config.momentum,
        "adjust_lr": config.adjust_lr,
        "adamw_lr_factor": config.adamw_lr_factor,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
    }


@OPTIMIZERS.register("soap")
class Soap:
    """SOAP for the matrices in the blocks, AdamW for all else: Adam in the eigenbasis of Shampoo's preconditioner
    (arXiv 2409.11321). See soap.py. It keeps two square matrices for each side of a matrix, and needs matrices whole:
    no fsdp2."""

    class Config(_AdamConfig):
        weight_decay: float = Field(default=0.01, ge=0, description="a step decays by weight_decay * lr (SOAP: 0.01)")
        soap_beta1: float = Field(
            default=0.95, ge=0, lt=1, description="decay of the mean of matrices' gradients (SOAP: 0.95)"
        )
        soap_beta2: float = Field(
            default=0.95, ge=0, lt=1, description="decay of their squares and of the preconditioner (SOAP: 0.95)"
        )
        frequency: int = Field(default=10, ge=1, description="steps between turns of the bases (SOAP: 10)")

    @staticmethod
    def more_states(model: nn.Module) -> int:
        sides = [
            size for matrix, rows in block_matrices(model).items() for part in rows for size in (part, matrix.shape[1])
        ]
        return sum(2 * size**2 for size in sides)

    def __new__(cls, config: Config, *, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        from training.optim.soap import Soap as Implementation

        return Implementation(
            model,
            config,
            block_matrices(model),
            lr=lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            soap_betas=(config.soap_beta1, config.soap_beta2),
            frequency=config.frequency,
        )
