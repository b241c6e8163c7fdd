"""Small real models and batches. Everything is seeded; nothing is mocked."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexbert import FlexBertConfig

# One token, both sides of the block size and of the window, and two windows.
ODD_LENGTHS = (1, 63, 64, 65, 129, 200)

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 256,
    "position": {"name": "rope", "global_theta": 5000.0, "local_theta": 100.0},
    "attention": {"name": "multihead", "global_attn_every_n_layers": 3, "window_per_side": 64},
    # Ten times the usual: with 0.02 attention would be flat and logits near 0, and mistakes invisible.
    "init": {"name": "full_megatron", "std": 0.2},
}


def tiny(**changes: Any) -> FlexBertConfig:
    """The tiny config with some keys replaced, inside slots by merging (a mapping without `name`)."""
    node = dict(TINY)
    for key, value in changes.items():
        merges = isinstance(value, dict) and "name" not in value
        node[key] = {**node.get(key, {}), **value} if merges else value
    return FlexBertConfig.from_dict(node)


class Batch(NamedTuple):
    """A packed batch; `model(*batch)` is a training forward."""

    input_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    labels: Tensor

    def split(self) -> list[Tensor]:
        """input_ids of each sequence."""
        return list(self.input_ids.split(self.cu_seqlens.diff().tolist()))


def batch_of(lengths: tuple[int, ...], vocab_size: int = 97, seed: int = 0, masked: float = 0.3) -> Batch:
    """Random ids in sequences of these lengths, about `masked` of them with a label."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    input_ids = torch.randint(0, vocab_size, (total,), generator=generator)
    targets = torch.randint(0, vocab_size, (total,), generator=generator)
    labels = torch.where(torch.rand(total, generator=generator) < masked, targets, -100)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return Batch(input_ids, cu_seqlens, max(lengths, default=0), labels)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient; fails for one that has none."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        found[name] = parameter.grad
    return found


def scrambled(model: Any) -> Any:
    """Ones and zeros would hide a norm or bias that is left out."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def equal(model: Any, other: Any) -> bool:
    """Whether their weights are the same bits. What they compute need not be: loaded weights lie where the file has them,
    and products of unaligned memory may add up in another order."""
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
