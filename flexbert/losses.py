"""Slot `loss`: over masked tokens, without ever holding all their logits.   M masked tokens, D hidden, V vocabulary."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from flexbert.kernels import factor, factor_, product, softmax_
from flexbert.registry import LOSSES
from flexbert_core.schema import Component

# Logits alive at once. On CUDA large products matter more than memory; on the CPU more of them gain no time.
CHUNK_ELEMENTS = {"cuda": 2**26}
CHUNK_ELEMENTS_DEFAULT = 2**24


class TokenScores(NamedTuple):
    """For the callee to fill in: what a loss knows about each masked token anyway. Without gradients."""

    losses: Tensor  # (M,) float32, plain cross entropy in nats
    hits: Tensor  # (M,) bool: no entry of the vocabulary scores higher than the target

    @classmethod
    def empty(cls, targets: Tensor) -> "TokenScores":
        """For the targets (M,). Losses are NaN until filled in: the metrics of one forgotten are null, not wrong."""
        losses = torch.full_like(targets, torch.nan, dtype=torch.float32)
        return cls(losses, torch.zeros_like(targets, dtype=torch.bool))


@LOSSES.register("cross_entropy")
class CrossEntropy:
    """Sum over tokens of (1 - e) * nll(target) + e * mean over the vocabulary of nll + z * log_norm^2.

    nll = log_norm - logit, log_norm = log sum exp logits. e, label smoothing: arXiv 1512.00567, sec. 7; z, the z-loss:
    PaLM, arXiv 2204.02311, sec. 5. Evaluation reports the plain cross entropy whatever is set here.
    """

    takes_shares: ClassVar[bool] = True

    class Config(Component):
        label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over the vocabulary")
        z_loss: float = Field(0.0, ge=0, description="weight of log_norm^2, which keeps logits small (PaLM: 1e-4)")

    def __init__(self, config: Config) -> None:
        self.config = config
        self.compiled = False
        """Whether torch.compile fuses what a chunk's logits go through: for CUDA."""

    def __call__(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scores: TokenScores | None = None,
        shares: Tensor | None = None,
    ) -> Tensor:
        """A float32 scalar; 0 for no tokens. Shapes: see masked_cross_entropy."""
        smoothing, z_loss = self.config.label_smoothing, self.config.z_loss
        return masked_cross_entropy(
            hidden_states, weight, bias, targets, smoothing, z_loss, scores, self.compiled, shares
        )


def masked_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    scores: TokenScores | None = None,
    compiled: bool = False,
    shares: Tensor | None = None,
) -> Tensor:
    """The sum that CrossEntropy states, for logits = hidden_states @ weight.T + bias; 0 for no tokens.

    hidden_states: (M, D). weight: (V, D). bias: (V,) or None. targets: (M,) int64 in [0, V). scores: filled if given.
    compiled: what follows the products of a chunk by torch.compile, with gradients only. shares: (M,) float32, what
    each token's term is multiplied by in the sum; None: 1. Scores are without.
    The products run in autocast's dtype if it is on, everything else in float32. Gradients are computed along with the
    loss, chunk by chunk, and only scaled in backward: exact, and no chunk's logits are made twice.
    """
    dtype = _product_dtype(hidden_states)
    if not (torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad)):
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        for products, rows in _chunks(hidden_states, factor(weight, dtype), dtype):
            logits = _logits(products, bias)
            target, log_norm = targets[rows, None], logits.logsumexp(1, keepdim=True)
            if scores is not None:
                _fill(scores, rows, logits.gather(1, target), logits.amax(1, keepdim=True), log_norm)
            share = None if shares is None else shares[rows]
            total += _chunk_loss(logits, target, log_norm, label_smoothing, z_loss, share)
        return total
    return _MaskedCrossEntropy.apply(  # pyright: ignore[reportReturnType]
        hidden_states, weight, bias, targets, dtype, label_smoothing, z_loss, scores, compiled, shares
    )


@torch.no_grad()
def masked_evaluation(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scores: TokenScores | None = None
) -> tuple[Tensor, Tensor]:
    """Like masked_cross_entropy, without gradients: (loss sum float64, tokens whose best score is the target)."""
    loss = torch.zeros((), dtype=torch.float64, device=hidden_states.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden_states.device)
    dtype = _product_dtype(hidden_states)
    for products, rows in _chunks(hidden_states, factor(weight, dtype), dtype):
        logits = _logits(products, bias)
        correct += (logits.argmax(1) == targets[rows]).sum()
        target, log_norm = targets[rows, None], logits.logsumexp(1, keepdim=True)
        if scores is not None:
            _fill(scores, rows, logits.gather(1, target), logits.amax(1, keepdim=True), log_norm)
        loss += _chunk_loss(logits, target, log_norm, 0.0, 0.0)
    return loss, correct


@torch.no_grad()
def sample_tokens(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chance: Tensor,
    adjust: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """A token for each row, drawn from the softmax of its logits: the first whose cumulative probability is over
    `chance`, (M,) float64 in [0, 1). (M,) int64. adjust: what the logits of a chunk, (m, V) float32, become before.
    Other arguments: see masked_cross_entropy."""
    tokens = torch.empty(len(hidden_states), dtype=torch.int64, device=hidden_states.device)
    dtype = _product_dtype(hidden_states)
    for products, rows in _chunks(hidden_states, factor(weight, dtype), dtype):
        logits = _logits(products, bias)
        reached = (logits if adjust is None else adjust(logits)).softmax(1).cumsum(1, dtype=torch.float64)
        drawn = chance[rows, None] * reached[:, -1:]  # rounding leaves the sum beside 1
        tokens[rows] = torch.searchsorted(reached, drawn, right=True).squeeze(1).clamp_max(len(weight) - 1)
    return tokens


class _MaskedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        label_smoothing: float,
        z_loss: float,
        scores: TokenScores | None,
        compiled: bool,
        shares: Tensor | None,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        hidden_gradient = torch.empty_like(hidden_states)
        weight_gradient = None
        bias_gradient = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        with torch.autocast(hidden_states.device.type, enabled=False):
            lowered = factor(weight, dtype)
            gradient_of = _compiled_gradient() if compiled else _chunk_gradient
            for products, rows in _chunks(hidden_states, lowered, dtype):
                target, states = targets[rows, None], factor(hidden_states[rows], dtype)
                share = None if shares is None else shares[rows]
                found = gradient_of(products, bias, target, dtype, label_smoothing, z_loss, share)
                total += found.loss
                if scores is not None:
                    _fill(scores, rows, found.chosen, found.largest, found.log_norm)
                if bias_gradient is not None and found.bias_gradient is not None:
                    bias_gradient += found.bias_gradient
                hidden_gradient[rows] = product(found.gradient, lowered.T)
                weight_gradient = _with_product(weight_gradient, found.gradient.T, states)
            if weight_gradient is None:
                weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = gradients
        hidden_gradient, weight_gradient, bias_gradient = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            hidden_gradient * scale.to(hidden_gradient.dtype),
            (weight_gradient * scale).to(weight_dtype),
            None if bias_gradient is None else (bias_gradient * scale).to(bias_dtype),
            *(None,) * 7,
        )


def _with_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right in float32, on the memory of `total`."""
    if total is None:
        return (left @ right).float()
    if left.dtype == torch.float32:
        return total.addmm_(left, right)
    return total.add_(left @ right)


def _product_dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _chunks(hidden_states: Tensor, weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, slice]]:
    """hidden_states @ weight.T of consecutive rows, and which rows. The consumer may overwrite them.

    weight: as `factor` gives it.
    """
    elements = CHUNK_ELEMENTS.get(hidden_states.device.type, CHUNK_ELEMENTS_DEFAULT)
    pieces = -(-len(hidden_states) * len(weight) // elements)
    bounds = [len(hidden_states) * number // max(pieces, 1) for number in range(pieces + 1)]
    for rows in (slice(first, last) for first, last in itertools.pairwise(bounds) if last > first):
        yield product(factor(hidden_states[rows], dtype), weight), rows


def _logits(products: Tensor, bias: Tensor | None) -> Tensor:
    """In float32, on the memory of float32 products."""
    logits = products.float()
    return logits if bias is None else logits.add_(bias)


class _ChunkGradient(NamedTuple):
    """Of m rows: what the backward needs of them, and what metrics do."""

    gradient: Tensor  # (m, V) of the loss by the logits, as a factor of products
    bias_gradient: Tensor | None  # (V,) float32
    loss: Tensor  # scalar float32
    chosen: Tensor  # (m, 1) float32: the target's logit
    largest: Tensor  # (m, 1) float32: the best one
    log_norm: Tensor  # (m, 1) float32


def _chunk_gradient(
    products: Tensor,
    bias: Tensor | None,
    target: Tensor,
    dtype: torch.dtype,
    label_smoothing: float,
    z_loss: float,
    share: Tensor | None,
) -> _ChunkGradient:
    """The loss of rows (m, V) without their bias, and its gradient: softmax minus the smoothed one-hot, times
    1 + 2 z log_norm for the z-loss, and each row's share. target: (m, 1). share: (m,)."""
    logits = _logits(products, bias)
    chosen, largest = logits.gather(1, target), logits.amax(1, keepdim=True)
    gradient, log_norm, loss = _softmax(logits, chosen, largest, label_smoothing, z_loss, share)
    if z_loss:
        gradient *= 1 + 2 * z_loss * log_norm
    if label_smoothing:
        gradient -= label_smoothing / logits.shape[1]
    if torch.compiler.is_compiling():  # becomes part of the pass that writes the gradient
        is_target = torch.arange(logits.shape[1], device=target.device) == target
        gradient = gradient + torch.where(is_target, label_smoothing - 1.0, 0.0)
    else:
        gradient.scatter_add_(1, target, gradient.new_full(target.shape, label_smoothing - 1.0))
    if share is not None:
        gradient *= share[:, None]
    bias_gradient = None if bias is None else gradient.sum(0)
    return _ChunkGradient(factor_(gradient, dtype), bias_gradient, loss, chosen, largest, log_norm)


@functools.cache
def _compiled_gradient() -> Callable[..., _ChunkGradient]:
    """For CUDA, where each of its passes over the logits costs as much as a third of a product."""
    return torch.compile(_chunk_gradient, dynamic=True)


def _fill(scores: TokenScores, rows: slice, chosen: Tensor, largest: Tensor, log_norm: Tensor) -> None:
    """All (m, 1). A tie for the best score is a hit: with logits of bfloat16 products an argmax would pick by place."""
    scores.losses[rows] = (log_norm - chosen).squeeze(1)
    scores.hits[rows] = (chosen == largest).squeeze(1)


def _softmax(
    logits: Tensor, chosen: Tensor, largest: Tensor, label_smoothing: float, z_loss: float, share: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, which may be written over the logits (m, V), log_norm (m, 1) and the chunk's loss.

    chosen, largest: logits of the targets and of the best, (m, 1). share: (m,). The softmax takes one pass: log_norm
    then follows from its largest entry.
    """
    mean = logits.mean(1) if label_smoothing else None
    if torch.compiler.is_compiling():
        log_norm = logits.logsumexp(1, keepdim=True)
        probs = (logits - log_norm).exp()
    else:
        probs = softmax_(logits)
        log_norm = largest - probs.amax(1, keepdim=True).log()
    return probs, log_norm, _sum_of_losses(log_norm, chosen, mean, label_smoothing, z_loss, share)


def _chunk_loss(
    logits: Tensor,
    targets: Tensor,
    log_norm: Tensor,
    label_smoothing: float,
    z_loss: float,
    share: Tensor | None = None,
) -> Tensor:
    """Sum over the rows of logits (m, V), with targets and log_norm (m, 1), times their shares (m,)."""
    mean = logits.mean(1) if label_smoothing else None
    return _sum_of_losses(log_norm, logits.gather(1, targets), mean, label_smoothing, z_loss, share)


def _sum_of_losses(
    log_norm: Tensor,
    chosen: Tensor,
    mean: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    share: Tensor | None,
) -> Tensor:
    """log_norm, chosen (the targets' logits): (m, 1). mean: of all logits, (m,), for label smoothing."""

    def total(terms: Tensor) -> Tensor:
        return terms.sum() if share is None else (terms.reshape(-1) * share).sum()

    loss = total(log_norm - chosen)
    if mean is not None:
        loss = (1 - label_smoothing) * loss + label_smoothing * (total(log_norm) - total(mean))
    if z_loss:
        loss = loss + z_loss * total(log_norm.square())
    return loss
