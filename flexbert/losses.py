"""Cross entropy over masked tokens, without ever holding all their logits.

M masked tokens, D hidden, V vocabulary."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Logits alive at once. On CUDA large products matter more than memory; on the CPU a piece should stay near the caches.
_CHUNK_ELEMENTS = {"cuda": 2**26}
_CHUNK_ELEMENTS_DEFAULT = 2**22


def masked_cross_entropy(hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Sum of -log softmax(hidden_states @ weight.T + bias)[target], a float32 scalar; 0 for no tokens.

    hidden_states: (M, D). weight: (V, D). bias: (V,) or None. targets: (M,) int64 in [0, V).
    The products run in autocast's dtype if it is on, everything else in float32. Gradients are computed along with the
    loss, chunk by chunk, and only scaled in backward: exact, and no chunk's logits are made twice.
    """
    if not (torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad)):
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        for logits, rows in _chunks(hidden_states, weight, bias, _product_dtype(hidden_states)):
            total += _chunk_loss(logits, targets[rows])
        return total
    dtype = _product_dtype(hidden_states)
    return _MaskedCrossEntropy.apply(hidden_states, weight, bias, targets, dtype)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def masked_evaluation(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Like masked_cross_entropy, without gradients: (loss sum float64, tokens whose best score is the target)."""
    loss = torch.zeros((), dtype=torch.float64, device=hidden_states.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden_states.device)
    for logits, rows in _chunks(hidden_states, weight, bias, _product_dtype(hidden_states)):
        correct += (logits.argmax(1) == targets[rows]).sum()
        loss += _chunk_loss(logits, targets[rows])
    return loss, correct


class _MaskedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        hidden_gradient = torch.empty_like(hidden_states)
        weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        bias_gradient = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        with torch.autocast(hidden_states.device.type, enabled=False):
            lowered = weight.to(dtype)
            for logits, rows in _chunks(hidden_states, lowered, bias, dtype):
                target = targets[rows, None]
                log_norm = logits.logsumexp(1, keepdim=True)
                total += (log_norm - logits.gather(1, target)).sum()
                # softmax minus one-hot, written over the logits
                gradient = logits.sub_(log_norm).exp_()
                gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
                if bias_gradient is not None:
                    bias_gradient += gradient.sum(0)
                gradient = gradient.to(dtype)
                hidden_gradient[rows] = gradient @ lowered
                if dtype == torch.float32:
                    weight_gradient.addmm_(gradient.T, hidden_states[rows].to(dtype))
                else:
                    weight_gradient += gradient.T @ hidden_states[rows].to(dtype)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        (scale,) = gradients
        hidden_gradient, weight_gradient, bias_gradient = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            hidden_gradient * scale.to(hidden_gradient.dtype),
            (weight_gradient * scale).to(weight_dtype),
            None if bias_gradient is None else (bias_gradient * scale).to(bias_dtype),
            None,
            None,
        )


def _product_dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _chunks(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[Tensor, slice]]:
    """Float32 logits of consecutive rows, and which rows. The consumer may overwrite them."""
    weight = weight.to(dtype)
    elements = _CHUNK_ELEMENTS.get(hidden_states.device.type, _CHUNK_ELEMENTS_DEFAULT)
    step = max(1, elements // len(weight))
    for first in range(0, len(hidden_states), step):
        rows = slice(first, min(first + step, len(hidden_states)))
        logits = (hidden_states[rows].to(dtype) @ weight.T).float()
        yield logits if bias is None else logits.add_(bias), rows


def _chunk_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.logsumexp(1) - logits.gather(1, targets[:, None]).squeeze(1)).sum()
