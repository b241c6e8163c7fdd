"""Slot `parallelism`: what each rank keeps. Whichever it is, every rank trains on its own rows of the global batch, and
the losses are the same to rounding.
"""

from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from flexbert import FlexBertForMaskedLM
from flexbert_core.schema import Component
from ranks import average_of_ones
from recipe.slots import PARALLELISMS


class Parallelism(Protocol):
    """What an entry offers. shards: whether ranks keep parts of the parameters."""

    shards: bool

    def options(self, model: FlexBertForMaskedLM) -> dict[str, Any]:
        """Arguments for Composer's Trainer, which then prepares the model."""
        ...

    def prepared(self, model: FlexBertForMaskedLM) -> None:
        """Called when it has."""
        ...

    def correct(self, loss: Tensor) -> Tensor:
        """The loss, with gradients such that the ranks' reduction of them is their mean."""
        ...


@PARALLELISMS.register("ddp")
class DataParallel:
    """Every rank keeps all parameters and optimizer states; gradients are averaged in backward (arXiv 2006.15704)."""

    shards = False

    class Config(Component):
        pass

    def __init__(self, config: Config, *, world_size: int) -> None:
        pass

    def options(self, model: FlexBertForMaskedLM) -> dict[str, Any]:
        return {}

    def prepared(self, model: FlexBertForMaskedLM) -> None:
        pass

    def correct(self, loss: Tensor) -> Tensor:
        return loss


@PARALLELISMS.register("fsdp2")
class FullySharded:
    """Every rank keeps its part of each parameter, gradient and optimizer state, over all ranks of the run; a block's
    parameters are gathered when it runs (PyTorch's fully_shard; ZeRO, arXiv 1910.02054, stage 3). One process alone has
    nothing to share and keeps all.

    Parameters are gathered and gradients reduced in float32; bf16 is autocast's, as under ddp: the same arithmetic.
    """

    class Config(Component):
        reshard_after_forward: bool = Field(
            default=True, description="free a block's gathered parameters until backward; false: faster, more memory"
        )

    def __init__(self, config: Config, *, world_size: int) -> None:
        self.config, self.shards, self._excess = config, world_size > 1, 1.0

    def options(self, model: FlexBertForMaskedLM) -> dict[str, Any]:
        if not self.shards:
            return {}
        from composer.utils.parallelism import FSDP2Config

        self._excess = average_of_ones(next(model.parameters()).device)
        # Composer asks its model's child which modules become units of their own. The rest, with the token table that
        # embedding and decoder share, is one more.
        blocks = set(model.encoder.layers)
        object.__setattr__(model, "fsdp_wrap_fn", blocks.__contains__)
        reshard = self.config.reshard_after_forward
        return {"parallelism_config": {"fsdp": FSDP2Config(reshard_after_forward=reshard, mixed_precision="FULL")}}

    def prepared(self, model: FlexBertForMaskedLM) -> None:
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(model, "evaluate")
        register_fsdp_forward_method(model, "within")

    def correct(self, loss: Tensor) -> Tensor:
        return loss if self._excess == 1 else _DivideGradient.apply(loss, self._excess)  # pyright: ignore[reportReturnType]


class _DivideGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, divisor: float) -> Tensor:
        ctx.divisor = divisor
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / ctx.divisor, None
