"""Which architectures of transformers are expressible here, and how their configs and names of weights map.

`fitting` tells whether a config of ours is one of them: its counterpart, translated back, must be the same function.
Dropout acts in training only, so an export that cannot express a site says 0 there: Hugging Face's ModernBERT has one
`attention_dropout` for two sites and none after the mlp.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexbert.config import TOKEN_IDS, FlexBertConfig
from schema import ConfigError


class Mapping(NamedTuple):
    """One architecture of transformers."""

    title: str
    architecture: str
    config_from: Callable[[Any], dict[str, Any]]  # transformers config -> our config's fields
    config_to: Callable[[FlexBertConfig], dict[str, Any]]  # the inverse, for a config with these slots:
    slots: dict[str, str]
    prefix: str  # of the encoder's weights
    names: list[tuple[str, tuple[str, ...]]]  # ours, theirs: patterns of prefixes; several: ours are theirs joined
    ignored: str  # pattern of their weights that repeat others, or serve another task


# transformers' name of an activation, where it is not ours.
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu", "relu2": "relu_squared"}
_SHARED_ACTIVATIONS = ("gelu", "silu", "relu", "tanh", "sigmoid", "mish", "relu6", "leaky_relu")

# What changes training or layout but not the function that trained weights compute.
_NOT_THE_FUNCTION = (*TOKEN_IDS, "init", "loss", "backend", "fused")


def _activation_from(field: str, name: Any) -> str:
    if name in _SHARED_ACTIVATIONS:
        return name
    if isinstance(name, str) and name in _ACTIVATIONS:
        return _ACTIVATIONS[name]
    valid = ", ".join(map(repr, (*_SHARED_ACTIVATIONS, *_ACTIVATIONS)))
    raise ConfigError(f"{field}: {name!r} has no counterpart here, only {valid}")


def _activation_to(name: str) -> str:
    return next((theirs for theirs, ours in _ACTIVATIONS.items() if ours == name), name)


def _refuse(hf: Any, **wanted: Any) -> None:
    for field, value in wanted.items():
        found = getattr(hf, field, value)
        if found != value:
            raise ConfigError(f"{field}: {found!r} of the Hugging Face config has no counterpart here, only {value!r}")


def _number(hf: Any, field: str, kinds: Any = int | float) -> Any:
    """A field that is calculated with here; our own schema checks the others."""
    value = getattr(hf, field)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ConfigError(f"{field}: {value!r} of the Hugging Face config should be a number")
    return value


def _float(hf: Any, field: str) -> float:
    """The same, where JSON may say 0 for 0.0."""
    return float(_number(hf, field))


_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def _common(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _SIZES}


def _modernbert_from(hf: Any) -> dict[str, Any]:
    _refuse(hf, tie_word_embeddings=True, rope_scaling=None)
    local_theta = "global_rope_theta" if hf.local_rope_theta is None else "local_rope_theta"
    return {
        **_common(hf),
        "max_position_embeddings": hf.max_position_embeddings,
        **{name: getattr(hf, name, None) for name in TOKEN_IDS},
        "embedding": {"name": "tokens", "norm": True, "dropout": _float(hf, "embedding_dropout")},
        "position": {
            "name": "rope",
            "global_theta": _float(hf, "global_rope_theta"),
            "local_theta": _float(hf, local_theta),
        },
        "attention": {
            "name": "multihead",
            "global_attn_every_n_layers": hf.global_attn_every_n_layers,
            "window_per_side": _number(hf, "local_attention", int) // 2,
            "qkv_bias": hf.attention_bias,
            "out_bias": hf.attention_bias,
            "probs_dropout": _float(hf, "attention_dropout"),
            "out_dropout": _float(hf, "attention_dropout"),
        },
        "norm": {"name": "layernorm", "eps": _float(hf, "norm_eps"), "bias": hf.norm_bias},
        "mlp": {
            "name": "glu",
            "activation": _activation_from("hidden_activation", hf.hidden_activation),
            "in_bias": hf.mlp_bias,
            "out_bias": hf.mlp_bias,
            "inner_dropout": _float(hf, "mlp_dropout"),
        },
        "block": {"name": "prenorm", "skip_first_attention_norm": True},
        "head": {
            "name": "mlm",
            "activation": _activation_from("classifier_activation", hf.classifier_activation),
            "dense_bias": hf.classifier_bias,
            "decoder_bias": hf.decoder_bias,
        },
        "init": {
            "name": "full_megatron",
            "std": _float(hf, "initializer_range"),
            "cutoff_factor": _float(hf, "initializer_cutoff_factor") if hf.initializer_cutoff_factor else 3.0,
        },
    }


def _modernbert_to(config: FlexBertConfig) -> dict[str, Any]:
    attention, mlp = config.attention, config.mlp
    one_dropout = attention.probs_dropout == attention.out_dropout
    init = config.init.model_dump()
    return {
        **_common(config),
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
        "hidden_activation": _activation_to(mlp.activation),
        "mlp_bias": mlp.in_bias,
        "mlp_dropout": mlp.inner_dropout,
        "classifier_activation": _activation_to(config.head.activation),
        "classifier_bias": config.head.dense_bias,
        "decoder_bias": config.head.decoder_bias,
        "initializer_range": init.get("std", 0.02),
        "initializer_cutoff_factor": init.get("cutoff_factor", 2.0),
    }


def _bert_from(hf: Any, offset: int = 0) -> dict[str, Any]:
    """offset: rows of the position table before position 0."""
    _refuse(hf, tie_word_embeddings=True, is_decoder=False, add_cross_attention=False)
    _refuse(hf, position_embedding_type="absolute")
    activation = _activation_from("hidden_act", hf.hidden_act)
    out_dropout = _float(hf, "hidden_dropout_prob")
    biases = {"in_bias": True, "out_bias": True}
    return {
        **_common(hf),
        "max_position_embeddings": _number(hf, "max_position_embeddings", int) - offset,
        **{name: getattr(hf, name, None) for name in TOKEN_IDS},
        "embedding": {"name": "tokens", "token_types": hf.type_vocab_size, "norm": True, "dropout": out_dropout},
        "position": {"name": "learned", "offset": offset},
        "attention": {
            "name": "multihead",
            "qkv_bias": True,
            "out_bias": True,
            "probs_dropout": _float(hf, "attention_probs_dropout_prob"),
            "out_dropout": out_dropout,
        },
        "norm": {"name": "layernorm", "eps": _float(hf, "layer_norm_eps"), "bias": True},
        "mlp": {"name": "mlp", "activation": activation, "out_dropout": out_dropout, **biases},
        "block": "postnorm",
        "head": {"name": "mlm", "activation": activation, "dense_bias": True, "decoder_bias": True},
        "init": {"name": "default", "std": _float(hf, "initializer_range")},
    }


def _bert_to(config: FlexBertConfig) -> dict[str, Any]:
    dropouts = {config.embedding.dropout, config.attention.out_dropout, config.mlp.out_dropout}
    return {
        **_common(config),
        "max_position_embeddings": config.max_position_embeddings + config.position.offset,
        "type_vocab_size": config.embedding.token_types,
        "hidden_act": _activation_to(config.mlp.activation),
        "hidden_dropout_prob": dropouts.pop() if len(dropouts) == 1 else 0.0,
        "attention_probs_dropout_prob": config.attention.probs_dropout,
        "layer_norm_eps": config.norm.eps,
        "initializer_range": config.init.model_dump().get("std", 0.02),
    }


def _roberta_from(hf: Any) -> dict[str, Any]:
    """Its position 0 is row pad_token_id + 1 of the table (fairseq's convention, kept by transformers)."""
    if hf.pad_token_id is None:
        raise ConfigError("pad_token_id: None of the Hugging Face config: RoBERTa's positions start behind it")
    head = {"name": "mlm", "activation": "gelu", "dense_bias": True, "decoder_bias": True}
    return {**_bert_from(hf, _number(hf, "pad_token_id", int) + 1), "head": head}


_MODERNBERT_SLOTS = {
    "embedding": "tokens",
    "position": "rope",
    "attention": "multihead",
    "norm": "layernorm",
    "mlp": "glu",
    "block": "prenorm",
    "head": "mlm",
}
_BERT_SLOTS = {**_MODERNBERT_SLOTS, "position": "learned", "mlp": "mlp", "block": "postnorm"}


def _bert_names(prefix: str, head: str, dense: str, norm: str) -> list[tuple[str, tuple[str, ...]]]:
    embeddings, layer, ours = f"{prefix}embeddings.", rf"{prefix}encoder.layer.\1.", r"encoder\.layers\.(\d+)\."
    projections = {"Wq": "query", "Wk": "key", "Wv": "value"}
    return [
        (r"encoder\.embedding\.tokens\.", (f"{embeddings}word_embeddings.",)),
        (r"encoder\.embedding\.types\.", (f"{embeddings}token_type_embeddings.",)),
        (r"encoder\.position\.table\.", (f"{embeddings}position_embeddings.",)),
        (r"encoder\.embedding\.norm\.", (f"{embeddings}LayerNorm.",)),
        (rf"{ours}attn\.Wqkv\.", tuple(f"{layer}attention.self.{theirs}." for theirs in projections.values())),
        *((rf"{ours}attn\.{name}\.", (f"{layer}attention.self.{theirs}.",)) for name, theirs in projections.items()),
        (rf"{ours}attn\.Wo\.", (f"{layer}attention.output.dense.",)),
        (rf"{ours}attn_norm\.", (f"{layer}attention.output.LayerNorm.",)),
        (rf"{ours}mlp\.Wi\.", (f"{layer}intermediate.dense.",)),
        (rf"{ours}mlp\.Wo\.", (f"{layer}output.dense.",)),
        (rf"{ours}mlp_norm\.", (f"{layer}output.LayerNorm.",)),
        (r"head\.dense\.", (f"{head}{dense}.",)),
        (r"head\.norm\.", (f"{head}{norm}.",)),
        (r"head\.decoder_bias$", (f"{head}bias",)),
    ]


MAPPINGS = {
    "modernbert": Mapping(
        "ModernBERT",
        "ModernBertForMaskedLM",
        _modernbert_from,
        _modernbert_to,
        _MODERNBERT_SLOTS,
        "model.",
        [
            (r"encoder\.embedding\.tokens\.", ("model.embeddings.tok_embeddings.",)),
            (r"encoder\.embedding\.", ("model.embeddings.",)),
            (r"encoder\.layers\.", ("model.layers.",)),
            (r"encoder\.final_norm\.", ("model.final_norm.",)),
            (r"head\.decoder_bias$", ("decoder.bias",)),
            (r"head\.", ("head.",)),
        ],
        r"decoder\.weight$",
    ),
    "bert": Mapping(
        "BERT",
        "BertForMaskedLM",
        _bert_from,
        _bert_to,
        _BERT_SLOTS,
        "bert.",
        _bert_names("bert.", "cls.predictions.", "transform.dense", "transform.LayerNorm"),
        r"cls\.predictions\.decoder\.|cls\.seq_relationship\.|bert\.pooler\.|bert\.embeddings\.position_ids$",
    ),
    "roberta": Mapping(
        "RoBERTa",
        "RobertaForMaskedLM",
        _roberta_from,
        _bert_to,
        _BERT_SLOTS,
        "roberta.",
        _bert_names("roberta.", "lm_head.", "dense", "layer_norm"),
        r"lm_head\.decoder\.|roberta\.pooler\.|roberta\.embeddings\.position_ids$",
    ),
}


def hf_names(mapping: Mapping, name: str) -> list[str]:
    """The Hugging Face names of one of our weights; several when ours is theirs joined along the first axis."""
    for ours, theirs in mapping.names:
        if match := re.match(ours, name):
            return [match.expand(part) + name[match.end() :] for part in theirs]
    raise AssertionError(f"no Hugging Face name for {name}")


def to_hf_state(mapping: Mapping, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names."""
    renamed = {}
    for name, tensor in state.items():
        names = hf_names(mapping, name)
        renamed |= {theirs: part.contiguous() for theirs, part in zip(names, tensor.chunk(len(names)), strict=True)}
    return renamed


def from_hf_state(mapping: Mapping, given: dict[str, Tensor], wanted: list[str]) -> dict[str, Tensor]:
    """Copies, float32 on the CPU, of the weights that we name `wanted`.

    Raises ConfigError for one that is missing, and for one left over that neither repeats another nor serves another
    task.
    """
    state, used = {}, set()
    for name in wanted:
        names = hf_names(mapping, name)
        for theirs in names:
            if theirs not in given:
                raise ConfigError(f"{theirs}: missing in the Hugging Face weights")
        used |= set(names)
        parts = [given[theirs].to("cpu", torch.float32, copy=True) for theirs in names]
        state[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    for theirs in sorted(given.keys() - used):
        if not re.match(mapping.ignored, theirs):
            raise ConfigError(f"{theirs}: has no place in this model")
    return state


def misfits(mapping: Mapping, config: FlexBertConfig, hf_config_of: Callable[..., Any]) -> list[str]:
    """What keeps a config from being this architecture, one line each: `field: value has no counterpart in ...`.

    hf_config_of: makes the transformers config that an export would have from the fields of `config_to`.
    """
    slots = {slot: name for slot, name in mapping.slots.items() if getattr(config, slot).name != name}
    if slots:
        pairs = [(slot, getattr(config, slot).name, name) for slot, name in slots.items()]
    else:
        try:
            fields = mapping.config_from(hf_config_of(**mapping.config_to(config)))
            back = FlexBertConfig.from_dict({name: value for name, value in fields.items() if name not in TOKEN_IDS})
        except ConfigError as error:
            return [str(error)]
        ours, theirs = _function(config.to_dict()), _function(back.to_dict())
        pairs = [(field, ours.get(field), theirs.get(field)) for field in sorted(ours.keys() | theirs.keys())]
    return [
        f"{field}: {mine!r} has no counterpart in Hugging Face's {mapping.title}, only {other!r}"
        for field, mine, other in pairs
        if mine != other
    ]


def _function(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`slot.field` -> value of everything that trained weights' function depends on."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if key in _NOT_THE_FUNCTION or key.endswith("dropout"):
            continue
        if isinstance(value, dict):
            flat |= _function(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
