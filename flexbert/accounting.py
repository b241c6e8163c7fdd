"""What a model costs, from its config alone: parameters, FLOPs and memory. Everything is built on the meta device."""

import functools
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from flexbert.config import FlexBertConfig, without_init
from flexbert.layers import OutputProjection
from flexbert.model import FlexBertForMaskedLM, build


def count_parameters(config: FlexBertConfig, head: bool = True) -> int:
    """Parameters of the model with its masked-token head, where a tied decoder counts once; or of its encoder alone."""
    model = _on_meta(config)
    return sum(parameter.numel() for parameter in (model if head else model.encoder).parameters())


def flops_per_token(config: FlexBertConfig, seq_len: int, masked_fraction: float, causal: bool = False) -> float:
    """Floating-point operations of forward and backward, per token of sequences of `seq_len` tokens (batch_flops)."""
    return batch_flops(config, [seq_len], [masked_fraction * seq_len], causal) / seq_len


def batch_flops(
    config: FlexBertConfig, lengths: ArrayLike, masked: ArrayLike, causal: bool = False, head: bool = True
) -> float:
    """Floating-point operations of forward and backward over packed sequences of these lengths, of each of which so
    many tokens are masked. head: whether the masked-token head reads them.

    Per token: 3 * (2 * W_layers + sum over layers of 4 * D * K + masked share * 2 * (W_head + V * D)), where W counts
    the weights of linear layers, D is hidden_size and K the number of keys a token sees: its sequence in global layers,
    in local ones the window less what falls off the sequence's ends, and where attention is causal none behind itself.
    A multiply-add is 2 operations and backward twice forward (Kaplan et al. 2020, arXiv 2001.08361, sec. 2.1);
    4 * D * K: products with keys and values (PaLM, arXiv 2204.02311, app. B). Norms, activations, softmax and the
    embedding lookup are left out (about 1 % at base size).
    The last layer's queries and what follows them are needed at masked tokens only, and counted so, even where they are
    computed for more (queries in kernels other than sdpa; up to a sixteenth of the batch in compiled blocks).
    """
    sizes, wanted = np.asarray(lengths, np.float64), np.asarray(masked, np.float64)
    work = _work(without_init(config).model_dump_json())
    shares = wanted / np.maximum(sizes, 1.0)
    pairs = 0.0
    for windows, of_each in ((work.windows, np.ones_like(shares)), (work.masked_windows, shares)):
        for (left, right), layers in windows.items():
            pairs += layers * (keys_seen((left, 0 if causal else right), sizes) * of_each).sum()
    masked_weights = work.masked_weights - (0 if head else work.head_weights)
    weights = work.weights * sizes.sum() + masked_weights * wanted.sum()
    return float(3.0 * (2.0 * weights + 4.0 * config.hidden_size * pairs))


class StepWork(NamedTuple):
    """What a step does for each token of full rows, on average."""

    weights: float  # of linear layers that multiply it, the decoder's for masked tokens
    widths: dict[int, float]  # the same by the smaller of a layer's inputs and outputs
    windows: dict[tuple[int, int], int]  # layers of each window size
    ends: int  # inputs and outputs of the linear layers of blocks
    parameters: int


def step_work(config: FlexBertConfig, masked_fraction: float) -> StepWork:
    """The parts that batch_flops adds up, and what moves through memory, for a prediction of time."""
    work = _work(without_init(config).model_dump_json())
    layers = [child for child in _on_meta(config).encoder.layers.modules() if isinstance(child, nn.Linear)]
    windows = Counter(work.windows)
    windows.update(work.masked_windows)
    weights = work.weights + masked_fraction * work.masked_weights
    ends = sum(child.in_features + child.out_features for child in layers)
    return StepWork(weights, _widths(_on_meta(config), masked_fraction), dict(windows), ends, count_parameters(config))


def memory_estimate(
    config: FlexBertConfig,
    tokens_per_microbatch: int,
    masked_fraction: float = 0.3,
    activation_bytes: int = 4,
    shards: int = 1,
    averages: int = 0,
) -> int:
    """Bytes that training needs on one device, roughly (within about 30 %).

    16 a parameter (float32 weight, gradient and two Adam moments; 4 more for each of `averages`) over `shards`, the
    ranks that share them; plus, where they do, weight and gradient of what is gathered at a time: two blocks, one of
    them on its way, and all that is in no block (PyTorch's fully_shard keeps its root whole).

    Plus activations kept for backward: per token inputs and outputs of the layers' linear maps, which in a ModernBERT
    layer is 8 * D + 3 * F (two norms' inputs and outputs, queries, keys and values, attention's result; both halves of
    the gated mlp and their product), F more with dropout inside the mlp, in the last layer from attention on for masked
    tokens only; per masked token 6 * D, plus the decoder's gradient, which the loss computes ahead of backward, and a
    chunk of logits with its copy. Not `attention_weights_memory`, which flash-attn does not need.

    activation_bytes: of one activation: 4 in float32, 2 in bfloat16. masked_fraction: masked tokens over all.
    """
    parameters = count_parameters(config)
    layers: list[Any] = list(_on_meta(config).encoder.layers.modules())
    ends = sum(child.in_features + child.out_features for child in layers if isinstance(child, nn.Linear))
    ends += sum(child.Wo.in_features for child in layers if _drops(child, "inner_dropout"))
    late = sum(linear.in_features + linear.out_features for linear in _late(_on_meta(config)))
    per_token = ends - (1 - masked_fraction) * late + masked_fraction * 6 * config.hidden_size
    head = 4 * config.vocab_size * config.hidden_size + 2 * 4 * min(
        int(masked_fraction * tokens_per_microbatch) * config.vocab_size, 2**26
    )
    kept = (16 + 4 * averages) * parameters / shards
    if shards > 1:
        blocks = [sum(weight.numel() for weight in block.parameters()) for block in _on_meta(config).encoder.layers]
        kept += 8 * (parameters - sum(blocks) + sum(sorted(blocks)[-2:]))
    return round(kept + activation_bytes * per_token * tokens_per_microbatch + head)


def attention_weights_memory(config: FlexBertConfig, seq_len: int, activation_bytes: int = 4) -> int:
    """Bytes per token of sequences of `seq_len` tokens that kernels other than flash-attn's keep for the gradient of
    dropped attention weights (in BERT): weights, their dropout and its result. 0 without such dropout."""
    dropped = sum(_drops(child, "probs_dropout") for child in _on_meta(config).modules())
    return 3 * activation_bytes * dropped * config.num_attention_heads * seq_len


def _drops(module: nn.Module, place: str) -> bool:
    return getattr(getattr(module, "config", None), place, 0.0) > 0


@functools.lru_cache(maxsize=8)
def _cached(key: str) -> FlexBertForMaskedLM:
    with torch.device("meta"):
        return build(FlexBertConfig.model_validate_json(key))


def _on_meta(config: FlexBertConfig) -> FlexBertForMaskedLM:
    return _cached(without_init(config).model_dump_json())


def _linear_weights(module: nn.Module, besides: Tensor | None = None) -> int:
    weights = (child.weight for child in module.modules() if isinstance(child, nn.Linear))
    return sum(weight.numel() for weight in weights if weight is not besides)


class _Work(NamedTuple):
    """What a forward does: of all tokens, and of the masked ones."""

    weights: int  # of linear layers
    masked_weights: int
    head_weights: int  # of them, those of the head with its decoder
    windows: dict[tuple[int, int], int]  # layers of each window size
    masked_windows: dict[tuple[int, int], int]


def _widths(model: FlexBertForMaskedLM, masked_fraction: float) -> dict[int, float]:
    late = {id(linear) for linear in _late(model)}
    decoder, _ = model.head.decoder(model.encoder.token_table)
    found = Counter[int]()
    found[min(decoder.shape)] += masked_fraction * decoder.numel()  # pyright: ignore[reportArgumentType]
    for part in (model.encoder, model.head):
        for child in part.modules():
            if isinstance(child, nn.Linear) and child.weight is not decoder:
                share = masked_fraction if part is model.head or id(child) in late else 1.0
                found[min(child.weight.shape)] += share * child.weight.numel()  # pyright: ignore[reportArgumentType]
    return dict(found)


@functools.lru_cache(maxsize=8)
def _work(key: str) -> _Work:
    model = _cached(key)
    decoder, _ = model.head.decoder(model.encoder.token_table)
    head = _linear_weights(model.head, besides=decoder) + decoder.numel()  # tied, of its own, or a parameter
    weights, windows = _linear_weights(model.encoder), _windows(model.encoder)
    late = _late(model)
    if not late:
        return _Work(weights, head, head, windows, Counter())
    late_weights, late_windows = sum(linear.weight.numel() for linear in late), _windows(model.encoder.layers[-1])
    return _Work(weights - late_weights, head + late_weights, head, windows - late_windows, late_windows)


def _late(model: FlexBertForMaskedLM) -> list[nn.Linear]:
    """Linear layers of the last block that only masked tokens need: all but those that make queries, keys and values;
    none of a block that is run whole."""
    last: Any = model.encoder.layers[-1]
    if not getattr(last, "selects_tokens", False):
        return []
    inputs = {module for module in last.attn.modules() if not isinstance(module, OutputProjection)}
    return [module for module in last.modules() if isinstance(module, nn.Linear) and module not in inputs]


def _windows(module: nn.Module) -> Counter[tuple[int, int]]:
    return Counter(tuple(each.window_size) for each in module.modules() if hasattr(each, "window_size"))  # pyright: ignore


def keys_seen(window_size: tuple[int, int], lengths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys that all tokens of a sequence of each length see together in a layer."""
    # On each side: token p from the end sees min(side, p) tokens.
    return lengths + sum(
        np.where((lengths > side) & (side >= 0), side * lengths - side * (side + 1) / 2, lengths * (lengths - 1) / 2)
        for side in window_size
    )
