"""Whether a run on a GPU repeats its bits: `trainer.deterministic`, and what it decides."""

import os

import torch

from flexbert.kernels import choose_backend, set_deterministic
from recipe.config import RunConfig

# Kernels whose backward adds up in one order when it is asked to. (flash3: one that does not is not chosen then.)
_REPEATING = ("flash2", "flash3", "torch_flash")


def decide(wanted: bool | None, world_size: int) -> bool:
    """Set attention, NCCL and Inductor as trainer.deterministic says (null: true for one rank); returns what holds.

    To be called before the ranks meet: NCCL reads its variables then. One that is set already stays.
    """
    deterministic = world_size == 1 if wanted is None else wanted
    set_deterministic(deterministic)
    if deterministic:
        # With NVLS, sums in the switch, two calls on the same numbers differ (NVIDIA/nccl, issue 1497).
        os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")
    from torch._inductor import config as inductor

    # Else Inductor times several shapes of a reduction's kernel and takes the fastest of this process
    # (torch/_inductor/runtime/triton_heuristics.py).
    inductor.triton.autotune_pointwise = not deterministic
    if hasattr(inductor, "deterministic"):  # torch 2.9 and later
        inductor.deterministic = deterministic  # pyright: ignore[reportAttributeAccessIssue]
    return deterministic


def describe(config: RunConfig, deterministic: bool, bf16: bool) -> str:
    """A line for the log: what is promised of the run's bits, and why not more."""
    if not deterministic:
        return "deterministic: no, kernels add up in the order that is fastest (trainer.deterministic=true: one order)"
    dtype, device = torch.bfloat16 if bf16 else torch.float32, "cuda" if torch.cuda.is_available() else "cpu"
    alibi = config.model.position.name == "alibi"
    named = set[str]()
    for index in range(config.model.num_hidden_layers):
        attention = config.model.layer(index).attention
        backend = getattr(attention, "backend", "auto")
        drops = getattr(attention, "probs_dropout", 0.0) > 0
        named.add(choose_backend(device, dtype, alibi, drops, config.model.head_dim) if backend == "auto" else backend)
    others = sorted(named - {*_REPEATING})
    if others:
        return f"deterministic: as far as known, but for attention by {', '.join(others)}, whose backward may not be"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return (
            f"deterministic: attention by {', '.join(sorted(named))} in one order, NCCL without NVLS; what is promised "
            "is one device: DDP's first step of a process reduces in other buckets"
        )
    return f"deterministic: yes, attention by {', '.join(sorted(named))} adds up in one order"
