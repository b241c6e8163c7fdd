"""Rotary positions: angles, tables and the rotation of queries and keys.   T packed tokens, N heads, H head dim.

Su et al. 2021, arXiv 2104.09864. angle = position * theta^(-2i/R), R the rotated components of a head, in float32
whatever the model's dtype. Layout "half": component i turns with i + R/2 (GPT-NeoX, ModernBERT); "interleaved": 2i with
2i + 1.
"""

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flexbert.config import FlexBertConfig, ModelComponent


class RotaryConfig(ModelComponent):
    """Fields of position `rope`."""

    global_theta: float = Field(
        10000.0, ge=1, le=1e15, description="base of the angles in global layers (ModernBERT: 160000)"
    )
    local_theta: float = Field(
        10000.0, ge=1, le=1e15, description="base of the angles in local layers (ModernBERT: 10000)"
    )
    layout: Literal["half", "interleaved"] = Field(
        "half", description="which components turn together: i and i + R/2, or 2i and 2i + 1 (NeoBERT)"
    )
    rotary_fraction: float = Field(1.0, gt=0, le=1, description="share of each head that is rotated, from its start on")
    scaling: Literal["none", "linear", "ntk"] = Field(
        "none",
        description="for longer sequences: linear divides positions by the factor (arXiv 2306.15595), ntk turns "
        "component i by (factor * theta)^(-2i/R) / factor^(2/R) (GTE-v1.5), at every length",
    )
    scaling_factor: float = Field(
        1.0, ge=1, le=1e6, description="context now over context in training; 1 with scaling none"
    )

    @model_validator(mode="after")
    def _check_factor(self) -> "RotaryConfig":
        if self.scaling == "none" and self.scaling_factor != 1:
            raise ValueError(f"scaling_factor: {self.scaling_factor} without scaling: set scaling to linear or ntk")
        return self

    def unread(self, model: FlexBertConfig) -> list[str]:
        lines = []
        default = type(self).model_fields["local_theta"].default
        if self.local_theta not in (default, self.global_theta) and not model.has_local_layers:
            lines.append(
                f"local_theta: {self.local_theta:g}, but all layers are global: global_theta is the one they read"
            )
        if self.scaling != "none" and self.scaling_factor == 1:
            lines.append(f"scaling: {self.scaling} with scaling_factor 1 changes nothing: set the factor")
        return lines

    def rotary_dim(self, head_dim: int) -> int:
        """R, the rotated components of a head."""
        return round(head_dim * self.rotary_fraction)

    def check(self, model: FlexBertConfig) -> None:
        if model.head_dim % 2:
            raise ValueError(
                f"hidden_size: {model.hidden_size} over num_attention_heads {model.num_attention_heads} is heads "
                f"of {model.head_dim}, and position rope needs an even size: change one of the two"
            )
        dim = model.head_dim * self.rotary_fraction
        if abs(dim - round(dim / 2) * 2) > 1e-6 * dim:  # 100 * 0.14 is 14.000000000000002
            raise ValueError(
                f"position.rotary_fraction: {self.rotary_fraction} of heads of {model.head_dim} is {dim:g}, no even "
                f"number: try {max(2, round(dim / 2) * 2) / model.head_dim}"
            )


class Rotation(NamedTuple):
    """Each token's angles, (T, 1, R) float32. Layout half: cos | cos and -sin | sin over the two halves; interleaved:
    the same numbers, pair beside pair."""

    cos: Tensor
    sin: Tensor
    interleaved: bool = False


class RotaryAngles:
    """Tables of angles, made when first asked for.

    Not buffers: they grow with the longest sequence seen, which differs between ranks, and DDP would try to synchronise
    buffers.
    """

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        self._tables: dict[tuple[float, torch.device], Tensor] = {}

    def clear(self) -> None:
        """Forget all tables: the config has changed."""
        self._tables.clear()

    def __call__(self, config: RotaryConfig, theta: float, position_ids: Tensor, max_seqlen: int) -> Rotation:
        """Angles of tokens at these places (T,) int64, each below max_seqlen."""
        key = (theta, position_ids.device)
        table = self._tables.get(key)
        if table is None or table.shape[1] < max_seqlen:
            with torch.no_grad():
                table = angle_table(config, theta, self.head_dim, max(max_seqlen, 512), position_ids.device)
            self._tables[key] = table
        cos, sin = table.index_select(1, position_ids).unsqueeze(2)
        return Rotation(cos, sin, config.layout == "interleaved")


def angle_table(config: RotaryConfig, theta: float, head_dim: int, positions: int, device: torch.device) -> Tensor:
    """(2, positions, R) float32, so that a rotation is two products over whole heads."""
    dim = config.rotary_dim(head_dim)
    exponents = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    factor = config.scaling_factor
    places = torch.arange(positions, device=device, dtype=torch.float32)[:, None]
    if config.scaling == "ntk":
        angles = places * (1.0 / (theta * factor) ** exponents / factor ** (2 / dim))
    else:
        angles = places / factor * (1.0 / theta**exponents)
    cos, sin = angles.cos(), angles.sin()
    if config.layout == "interleaved":
        return torch.stack((torch.stack((cos, cos), 2).flatten(1), torch.stack((-sin, sin), 2).flatten(1)))
    return torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)))


class _Rotate(torch.autograd.Function):
    """Saves only the shared tables; the gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(states, cos, sin, interleaved, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(gradients[0], cos, sin, ctx.interleaved, -1), None, None, None


def _turn(states: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, direction: int) -> Tensor:
    dim = cos.shape[-1]
    # Once, and not inside each product with the float32 angles: a quarter of the time in bfloat16
    turning = states if dim == states.shape[-1] else states[..., :dim]
    turning = turning.to(torch.promote_types(states.dtype, cos.dtype))
    turned = turning * cos
    if interleaved:
        swapped = turning.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        turned.addcmul_(swapped, sin, value=direction)
    else:
        for half, other in ((slice(None, dim // 2), slice(dim // 2, None)), (slice(dim // 2, None), slice(dim // 2))):
            turned[..., half].addcmul_(turning[..., other], sin[..., half], value=direction)
    turned = turned.to(states.dtype)
    return turned if dim == states.shape[-1] else torch.cat((turned, states[..., dim:]), -1)


def rotate(states: Tensor, rotation: Rotation | None) -> Tensor:
    """Turn queries or keys (T, N, H) by their angles, in float32; the result has the dtype of `states`."""
    if rotation is None:
        return states
    return _Rotate.apply(states, rotation.cos, rotation.sin, rotation.interleaved)  # pyright: ignore[reportReturnType]
