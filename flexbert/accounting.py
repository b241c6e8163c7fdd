"""What a model costs, from its config alone: parameters, FLOPs and memory. Everything is built on the meta device."""

import functools
from typing import Any

import torch
from torch import nn

from flexbert.config import FlexBertConfig, without_init
from flexbert.model import FlexBertForMaskedLM, build


def count_parameters(config: FlexBertConfig) -> int:
    """Parameters of the model with its masked-token head; a tied decoder counts once."""
    return sum(parameter.numel() for parameter in _on_meta(config).parameters())


def flops_per_token(config: FlexBertConfig, seq_len: int, masked_fraction: float) -> float:
    """Floating-point operations of forward and backward, per token of sequences of `seq_len` tokens.

    3 * (2 * W_layers + sum over layers of 4 * D * K + masked_fraction * 2 * (W_head + V * D)), where W counts the
    weights of linear layers, D is hidden_size and K the mean number of keys a token sees: seq_len in global layers, in
    local ones the window less what falls off the sequence's ends. A multiply-add is 2 operations and backward twice
    forward (Kaplan et al. 2020, arXiv 2001.08361, sec. 2.1); 4 * D * K: products with keys and values (PaLM, arXiv
    2204.02311, app. B). Norms, activations, softmax and the embedding lookup are left out (about 1 % at base size).
    """
    model = _on_meta(config)
    forward = 2.0 * _linear_weights(model.encoder)
    windows = [module.window_size for module in model.encoder.modules() if hasattr(module, "window_size")]
    forward += 4.0 * config.hidden_size * sum(_mean_keys(window, seq_len) for window in windows)
    tied_decoder = config.vocab_size * config.hidden_size if getattr(config.head, "tied", True) else 0
    forward += masked_fraction * 2.0 * (_linear_weights(model.head) + tied_decoder)
    return 3.0 * forward


def memory_estimate(
    config: FlexBertConfig, tokens_per_microbatch: int, masked_fraction: float = 0.3, activation_bytes: int = 4
) -> int:
    """Bytes that training needs on one device, roughly (within about 30 %), without data parallel sharding.

    16 a parameter (float32 weight, gradient and two Adam moments), plus activations kept for backward: per token two
    numbers for each output of the layers' linear maps, which in a ModernBERT layer is 10 * D + 4 * F (two norms' inputs
    and outputs, queries, keys and values before and after rotation, attention's result; both halves of the gated mlp,
    the activated half and the product), per masked token 6 * D, plus the decoder's gradient, which the loss computes
    ahead of backward, and one chunk of logits with its copy.

    activation_bytes: of one activation: 4 in float32, 2 in bfloat16. masked_fraction: masked tokens over all.
    """
    parameters = count_parameters(config)
    layers = _on_meta(config).encoder.layers.modules()
    per_token = 2.0 * sum(child.out_features for child in layers if isinstance(child, nn.Linear))
    per_token += masked_fraction * 6 * config.hidden_size
    head = 4 * config.vocab_size * config.hidden_size + 2 * 4 * min(
        int(masked_fraction * tokens_per_microbatch) * config.vocab_size, 2**26
    )
    return round(16 * parameters + activation_bytes * per_token * tokens_per_microbatch + head)


@functools.lru_cache(maxsize=8)
def _cached(key: str) -> FlexBertForMaskedLM:
    with torch.device("meta"):
        return build(FlexBertConfig.model_validate_json(key))


def _on_meta(config: FlexBertConfig) -> FlexBertForMaskedLM:
    return _cached(without_init(config).model_dump_json())


def _linear_weights(module: nn.Module) -> int:
    return sum(child.weight.numel() for child in module.modules() if isinstance(child, nn.Linear))


@functools.lru_cache(maxsize=64)
def _mean_keys(window_size: Any, seq_len: int) -> float:
    """Keys that a token of a sequence sees in a layer, on average over the sequence."""
    left, right = window_size
    if left < 0:
        return float(seq_len)
    return sum(min(place + right, seq_len - 1) - max(place - left, 0) + 1 for place in range(seq_len)) / seq_len
