"""Slot `parallelism`: what each rank keeps. Whichever it is, every rank trains on its own rows of the global batch, and
the losses are the same to rounding.
"""

from typing import Any, Literal, Protocol

import torch
from pydantic import Field

import ranks
from flexbert import FlexBertForMaskedLM
from flexbert_core.schema import Component, ConfigError
from recipe.slots import PARALLELISMS


class Parallelism(Protocol):
    """What an entry offers. shards: whether ranks keep parts of the parameters."""

    shards: bool

    def options(self, model: FlexBertForMaskedLM, bf16: bool) -> dict[str, Any]:
        """Arguments for Composer's Trainer, which then prepares the model. bf16: whether the run computes in it."""
        ...

    def prepared(self, model: FlexBertForMaskedLM) -> None:
        """Called when it has."""
        ...

    def begin(self, is_last: bool) -> None:
        """A microbatch's forward is about to run. is_last: of the step."""
        ...


@PARALLELISMS.register("ddp")
class DataParallel:
    """Every rank keeps all parameters and optimizer states; gradients are averaged in backward (arXiv 2006.15704), of
    the step's last microbatch only."""

    shards = False

    class Config(Component):
        pass

    def __init__(self, config: Config, *, world_size: int) -> None:
        pass

    def options(self, model: FlexBertForMaskedLM, bf16: bool) -> dict[str, Any]:
        return {}

    def prepared(self, model: FlexBertForMaskedLM) -> None:
        pass

    def begin(self, is_last: bool) -> None:
        pass


@PARALLELISMS.register("fsdp2")
class FullySharded:
    """Every rank keeps its part of each parameter, gradient and optimizer state; a block's parameters are gathered when
    it runs (PyTorch's fully_shard; ZeRO, arXiv 1910.02054, stage 3). One process alone holds all, in the same code.

    Gradients are added up in float32 on each rank, and reduced in float32 with the step's last microbatch only: until
    then a rank keeps its sums whole, 4 bytes a parameter. What is in no block, with the token table, is gathered in
    float32. The residual stream and the optimizer are float32 whatever is gathered.
    """

    class Config(Component):
        reshard_after_forward: bool = Field(
            default=True,
            description="free a block's gathered parameters until backward, and after it; false: they are gathered "
            "once a step: faster, more memory",
        )
        replicate: int = Field(
            default=1,
            ge=1,
            description="copies of the model: parameters are shared by world size / replicate neighbouring ranks, such "
            "as those of a node, and gradients averaged over the copies (HSDP, arXiv 2304.11277); 1: one copy",
        )
        gather: Literal["fp32", "bf16"] = Field(
            default="fp32",
            description="dtype in which blocks' parameters are gathered; fp32: the arithmetic of ddp. bf16: "
            "half of what is sent, and weights of norms and biases are rounded too, which ddp reads in float32",
        )

    def __init__(self, config: Config, *, world_size: int) -> None:
        """Raises ConfigError when the copies cannot be of one size."""
        if world_size % config.replicate:
            raise ConfigError(
                f"trainer.parallelism.replicate: {config.replicate} copies cannot share {world_size} ranks evenly: "
                "give a divisor of their number"
            )
        self.config, self.world_size, self.shards = config, world_size, True
        self._root: Any = None
        self._bf16 = False

    def options(self, model: FlexBertForMaskedLM, bf16: bool) -> dict[str, Any]:
        from composer.utils.parallelism import FSDP2Config

        self._bf16 = self.config.gather == "bf16"
        if self._bf16 and not bf16:
            raise ConfigError(
                "trainer.parallelism.gather: bf16, but the run computes in float32: set trainer.precision=amp_bf16, or "
                "gather: fp32"
            )
        on_cpu = next(model.parameters()).device.type == "cpu"
        if self._bf16 and on_cpu and any(isinstance(each, torch.nn.LayerNorm) for each in model.modules()):
            raise ConfigError(
                "trainer.parallelism.gather: bf16: the CPU's layer norm takes no bfloat16 weights: use gather: fp32"
            )
        # Composer asks its model's child which modules become units of their own. The rest, with the token table that
        # embedding and decoder share, is one more.
        object.__setattr__(model, "fsdp_wrap_fn", set(model.encoder.layers).__contains__)
        shared = FSDP2Config(reshard_after_forward=self.config.reshard_after_forward, mixed_precision="FULL")
        if self.config.replicate > 1:
            shared.device_mesh = ranks.mesh(self.config.replicate, next(model.parameters()).device.type)
        return {"parallelism_config": {"fsdp": shared}}

    def prepared(self, model: FlexBertForMaskedLM) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method

        register_fsdp_forward_method(model, "evaluate")
        register_fsdp_forward_method(model, "within")
        self._root = model
        if self._bf16:
            # Composer takes one policy for all, and casts what blocks are called with: the stream between them stays
            # float32 here, as autocast leaves it.
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
            for block in model.encoder.layers:
                state: Any = block._get_fsdp_state()  # pyright: ignore
                state._mp_policy = state._fsdp_param_group.mp_policy = policy  # read when the first forward begins
        if not ranks.averages():
            ranks.average_by_sums(model)

    def begin(self, is_last: bool) -> None:
        if self._root is not None:
            self._root.set_requires_gradient_sync(is_last)
            if not self.config.reshard_after_forward:
                self._root.set_reshard_after_backward(is_last)
