"""Which architectures of transformers are expressible here, and how their configs and names of weights map.

Dropout acts in training only, so an export that cannot express a site says 0 there: Hugging Face's ModernBERT has one
`attention_dropout` for two sites and none after the mlp.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from flexbert.config import TOKEN_IDS, FlexBertConfig
from schema import ConfigError


class Mapping(NamedTuple):
    """One architecture of transformers."""

    architecture: str
    config_from: Callable[[Any], dict[str, Any]]  # transformers config -> our config's fields
    config_to: Callable[[FlexBertConfig], dict[str, Any]]  # the inverse
    names: list[tuple[str, str]]  # ours, theirs: regular expressions of prefixes, with \1 for the layer


def _modernbert_from(hf: Any) -> dict[str, Any]:
    refused = {
        "tie_word_embeddings": (hf.tie_word_embeddings, True),
        "rope_scaling": (getattr(hf, "rope_scaling", None), None),
    }
    for field, (value, wanted) in refused.items():
        if value != wanted:
            raise ConfigError(f"{field}: {value!r} of the Hugging Face config has no counterpart here, only {wanted!r}")
    for field in ("hidden_activation", "classifier_activation"):
        if getattr(hf, field) not in ("gelu", "silu"):
            raise ConfigError(f"{field}: {getattr(hf, field)!r} has no counterpart here, only 'gelu' and 'silu'")
    if hf.hidden_size % hf.num_attention_heads:
        raise ConfigError(
            f"hidden_size: {hf.hidden_size} is no multiple of num_attention_heads {hf.num_attention_heads}"
        )
    local_theta = hf.global_rope_theta if hf.local_rope_theta is None else hf.local_rope_theta
    return {
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "num_hidden_layers": hf.num_hidden_layers,
        "num_attention_heads": hf.num_attention_heads,
        "intermediate_size": hf.intermediate_size,
        "max_position_embeddings": hf.max_position_embeddings,
        **{name: getattr(hf, name, None) for name in TOKEN_IDS},
        "embedding": {"name": "tokens", "norm": True, "dropout": float(hf.embedding_dropout)},
        "position": {"name": "rope", "global_theta": float(hf.global_rope_theta), "local_theta": float(local_theta)},
        "attention": {
            "name": "multihead",
            "global_attn_every_n_layers": hf.global_attn_every_n_layers,
            "window_per_side": hf.local_attention // 2,
            "qkv_bias": hf.attention_bias,
            "out_bias": hf.attention_bias,
            "probs_dropout": float(hf.attention_dropout),
            "out_dropout": float(hf.attention_dropout),
        },
        "norm": {"name": "layernorm", "eps": hf.norm_eps, "bias": hf.norm_bias},
        "mlp": {
            "name": "glu",
            "activation": hf.hidden_activation,
            "in_bias": hf.mlp_bias,
            "out_bias": hf.mlp_bias,
            "inner_dropout": float(hf.mlp_dropout),
        },
        "block": {"name": "prenorm", "skip_first_attention_norm": True},
        "head": {
            "name": "mlm",
            "activation": hf.classifier_activation,
            "dense_bias": hf.classifier_bias,
            "decoder_bias": hf.decoder_bias,
        },
        "init": {
            "name": "full_megatron",
            "std": hf.initializer_range,
            "cutoff_factor": float(hf.initializer_cutoff_factor or 3.0),
        },
    }


def _modernbert_to(config: FlexBertConfig) -> dict[str, Any]:
    slots = {
        "embedding": "tokens",
        "position": "rope",
        "attention": "multihead",
        "norm": "layernorm",
        "mlp": "glu",
        "block": "prenorm",
        "head": "mlm",
    }
    for slot, wanted in slots.items():
        if (name := getattr(config, slot).name) != wanted:
            raise ConfigError(f"{slot}: {name!r} has no counterpart in Hugging Face's ModernBERT, only {wanted!r}")
    attention, mlp = config.attention, config.mlp
    needed = [
        ("embedding.norm", config.embedding.norm, True),
        ("block.skip_first_attention_norm", config.block.skip_first_attention_norm, True),
        ("attention.out_bias", attention.out_bias, attention.qkv_bias),
        ("mlp.out_bias", mlp.out_bias, mlp.in_bias),
    ]
    for field, value, wanted in needed:
        if value != wanted:
            raise ConfigError(
                f"{field}: {value!r} has no counterpart in Hugging Face's ModernBERT, only {wanted!r} here"
            )
    one_dropout = attention.probs_dropout == attention.out_dropout
    init = config.init.model_dump()
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "embedding_dropout": config.embedding.dropout,
        "global_rope_theta": config.position.global_theta,
        "local_rope_theta": config.position.local_theta,
        "global_attn_every_n_layers": attention.global_attn_every_n_layers,
        "local_attention": 2 * attention.window_per_side,
        "attention_bias": attention.qkv_bias,
        "attention_dropout": attention.probs_dropout if one_dropout else 0.0,
        "norm_eps": config.norm.eps,
        "norm_bias": config.norm.bias,
        "hidden_activation": mlp.activation,
        "mlp_bias": mlp.in_bias,
        "mlp_dropout": mlp.inner_dropout,
        "classifier_activation": config.head.activation,
        "classifier_bias": config.head.dense_bias,
        "decoder_bias": config.head.decoder_bias,
        "initializer_range": init.get("std", 0.02),
        "initializer_cutoff_factor": init.get("cutoff_factor", 2.0),
    }


MAPPINGS = {
    "modernbert": Mapping(
        "ModernBertForMaskedLM",
        _modernbert_from,
        _modernbert_to,
        [
            (r"encoder\.embedding\.tokens\.", "model.embeddings.tok_embeddings."),
            (r"encoder\.embedding\.", "model.embeddings."),
            (r"encoder\.layers\.", "model.layers."),
            (r"encoder\.final_norm\.", "model.final_norm."),
            (r"head\.decoder_bias$", "decoder.bias"),
            (r"head\.", "head."),
        ],
    )
}


def hf_name(mapping: Mapping, name: str) -> str:
    """The Hugging Face name of one of our weights."""
    for ours, theirs in mapping.names:
        if re.match(ours, name):
            return re.sub(rf"^{ours}", theirs, name)
    raise AssertionError(f"no Hugging Face name for {name}")
