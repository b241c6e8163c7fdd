"""Architectures for `models.tiny`: BERT's, and what transformers has no class for."""

from typing import Any

BERT: dict[str, Any] = {
    "embedding": {"name": "tokens", "token_types": 2, "dropout": 0.1},
    "position": "learned",
    "attention": {"name": "multihead", "qkv_bias": True, "out_bias": True, "probs_dropout": 0.2, "out_dropout": 0.1},
    "norm": {"name": "layernorm", "eps": 1e-12, "bias": True},
    "mlp": {"name": "mlp", "activation": "gelu_tanh", "in_bias": True, "out_bias": True, "out_dropout": 0.1},
    "block": "postnorm",
    "head": {"name": "mlm", "activation": "gelu_tanh", "dense_bias": True},
    "init": {"name": "default", "std": 0.2},
}

IDS = {
    "cls_token_id": 1,
    "sep_token_id": 2,
    "pad_token_id": 3,
    "mask_token_id": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


NORM = {"name": "layernorm", "bias": True}

SANDWICH: dict[str, Any] = {
    "embedding": {"name": "tokens", "scaled": True, "token_types": 2, "norm": False},
    "position": {"name": "rope", "layout": "interleaved", "rotary_fraction": 0.5, "scaling": "ntk", "scaling_factor": 2.0},
    "attention": {"num_key_value_heads": 1, "qk_norm": "rmsnorm", "fused": False, "inner_norm": NORM},
    "norm": "rmsnorm",
    "mlp": {"name": "mlp", "activation": "relu_squared", "inner_norm": "rmsnorm"},
    "block": "sandwich",
    "initial_layers": {"count": 2, "mlp": {"name": "glu", "activated_half": "second", "activation": "prelu"}},
    "head": {"name": "mlm", "transform": False, "tied": False},
}  # fmt: skip

PARALLEL: dict[str, Any] = {
    "position": "alibi",
    "norm": NORM,
    "attention": {"num_key_value_heads": 1, "qkv_bias": True},
    "block": "parallel",
    "head": {"name": "mlm", "decoder_bias": False, "activation": "silu"},
}

SINUSOIDAL: dict[str, Any] = {
    "position": {"name": "sinusoidal", "learned_scale": True},
    "initial_layers": {"count": 3, "block": "postnorm"},
}

LEARNED: dict[str, Any] = {
    "position": {"name": "learned", "offset": 2},
    "block": {"name": "prenorm", "skip_first_attention_norm": False},
}

LINEAR: dict[str, Any] = {
    "position": {"name": "rope", "scaling": "linear", "scaling_factor": 4.0, "local_theta": 50.0},
    "attention": {"window_per_side": 5, "global_attn_every_n_layers": 2},
}

CASES = {"sandwich": SANDWICH, "parallel": PARALLEL, "sinusoidal": SINUSOIDAL, "learned": LEARNED, "linear": LINEAR}
