"""Slot `position`: how a token's place enters the model.   T packed tokens, N heads, H head dim."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from flexbert.registry import POSITIONS, ModelComponent

if TYPE_CHECKING:
    from flexbert.config import FlexBertConfig


class Rotation(NamedTuple):
    """Each token's angles, (T, 1, H) float32: cos | cos and -sin | sin over the two halves of a head."""

    cos: Tensor
    sin: Tensor


class Rotations(NamedTuple):
    """What a forward's attention layers need to know about positions; None: nothing to rotate."""

    global_layers: Rotation | None = None
    local_layers: Rotation | None = None


class Position(nn.Module):
    """Base of the entries: does nothing at either place where positions can enter."""

    def embed(self, hidden_states: Tensor, position_ids: Tensor) -> Tensor:
        """Add positions to token embeddings: (T, D), (T,) int64 restarting at 0 in each sequence -> (T, D)."""
        return hidden_states

    def rotations(self, position_ids: Tensor, max_seqlen: int) -> Rotations:
        """Angles for the attention layers, computed once per forward."""
        return Rotations()


@POSITIONS.register("rope")
class RotaryPosition(Position):
    """Rotary embedding (Su et al. 2021, arXiv 2104.09864), "half" layout: component i turns with component i + H/2.

    angle = position * theta^(-2i/H), in float32 whatever the model's dtype. Tables are plain attributes, not buffers:
    they grow with the longest sequence seen, which differs between ranks, and DDP would try to synchronise buffers.
    """

    class Config(ModelComponent):
        global_theta: float = Field(
            10000.0, gt=0, description="base of the angles in global layers (ModernBERT: 160000)"
        )
        local_theta: float = Field(10000.0, gt=0, description="base of the angles in local layers (ModernBERT: 10000)")

        def check(self, model: "FlexBertConfig") -> None:
            if model.head_dim % 2:
                raise ValueError(
                    f"hidden_size: {model.hidden_size} over num_attention_heads {model.num_attention_heads} is heads "
                    f"of {model.head_dim}, and position rope needs an even size: change one of the two"
                )

    def __init__(self, config: Config, *, head_dim: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_dim
        self._tables: dict[tuple[float, torch.device], Tensor] = {}

    def set_theta(self, config: Config) -> None:
        """Use other thetas from the next forward on."""
        self.config = config
        self._tables.clear()

    def rotations(self, position_ids: Tensor, max_seqlen: int) -> Rotations:
        global_layers = self._rotation(self.config.global_theta, position_ids, max_seqlen)
        if self.config.local_theta == self.config.global_theta:
            return Rotations(global_layers, global_layers)
        return Rotations(global_layers, self._rotation(self.config.local_theta, position_ids, max_seqlen))

    def _rotation(self, theta: float, position_ids: Tensor, max_seqlen: int) -> Rotation:
        key = (theta, position_ids.device)
        table = self._tables.get(key)
        if table is None or table.shape[1] < max_seqlen:
            with torch.no_grad(), torch.autocast(position_ids.device.type, enabled=False):
                table = _angle_table(theta, self.head_dim, max(max_seqlen, 512), position_ids.device)
            self._tables[key] = table
        cos, sin = table.index_select(1, position_ids).unsqueeze(2)
        return Rotation(cos, sin)


def _angle_table(theta: float, head_dim: int, positions: int, device: torch.device) -> Tensor:
    """(2, positions, H) float32: cos | cos, then -sin | sin, so that a rotation is two products over whole heads."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angles = torch.arange(positions, device=device, dtype=torch.float32)[:, None] * (1.0 / theta**exponents)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)))


class _Rotate(torch.autograd.Function):
    """Saves only the shared tables; the gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(states, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradients[0], cos, sin, -1), None, None


def _turn(states: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    first, second = states.float().chunk(2, -1)
    swapped = torch.cat((second, first), -1)
    return torch.addcmul(states * cos, swapped, sin, value=direction).to(states.dtype)


def rotate(states: Tensor, rotation: Rotation | None) -> Tensor:
    """Turn queries or keys (T, N, H) by their angles, in float32; the result has the dtype of `states`."""
    if rotation is None:
        return states
    return _Rotate.apply(states, rotation.cos, rotation.sin)  # pyright: ignore[reportReturnType]
