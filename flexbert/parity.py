"""Does an attention backend compute what `eager` does, on this very machine?"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from flexbert.config import FlexBertConfig
from flexbert.kernels import Backend, require_backend
from flexbert.model import build

BACKENDS: tuple[str, ...] = tuple(name for name in get_args(Backend) if name not in ("auto", "eager"))
_LENGTHS = (1, 129, 64, 300, 17)
_WINDOW = 32
# Largest difference over the largest value. Measured on a CPU: sdpa 4e-7 in float32.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Parity:
    """error: the largest difference to eager, of outputs and of gradients, over the largest value there."""

    error: float
    tolerance: float
    dtype: str


def disagreement(backend: str, device: str) -> Parity:
    """Run a model of two layers, one global and one local, forward and backward, by a backend and by eager.

    In float32 where the backend can, else by autocast to bfloat16 against eager in the same.
    Raises ConfigError when the backend cannot run on this device.
    """
    require_backend(backend, device)  # pyright: ignore[reportArgumentType]
    dtype = torch.bfloat16 if backend in ("flash2", "flash3", "torch_flash") else torch.float32
    ours, theirs = (_outputs(name, device, dtype) for name in (backend, "eager"))
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))
    return Parity(error, _TOLERANCES[dtype], str(dtype).removeprefix("torch."))


def _outputs(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Hidden states and the gradients of all parameters, float32."""
    config = FlexBertConfig.from_dict(
        {
            "vocab_size": 64,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "attention": {
                "name": "multihead",
                "backend": backend,
                "global_attn_every_n_layers": 2,
                "window_per_side": _WINDOW,
            },
        }
    )
    model = build(config, "encoder", seed=1).to(device)
    generator = torch.Generator().manual_seed(1)
    bounds = torch.tensor([0, *_LENGTHS]).cumsum(0)
    ids = torch.randint(0, 64, (int(bounds[-1]),), generator=generator).to(device)
    wanted = torch.randn(len(ids), 128, generator=generator).to(device)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        states = model(ids, bounds.int().to(device), max(_LENGTHS))
    (states.float() * wanted).sum().backward()
    gradients = [parameter.grad.float() for parameter in model.parameters() if parameter.grad is not None]
    return [states.detach().float(), *gradients]
