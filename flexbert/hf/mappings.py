"""Which architectures of transformers are expressible here, and how their configs and names of weights map.

`misfits` tells whether a config of ours is one of them: its counterpart, translated back, must be the same function.
Dropout acts in training only, so an export that cannot express a site says 0 there (`lost_dropouts` names it): Hugging
Face's ModernBERT has one `attention_dropout` for two sites and none after the mlp.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from flexbert.config import TOKEN_IDS, FlexBertConfig
from flexbert.hf.fields import ONLY, Fields, LayerFields
from flexbert_core.composing import leaves
from flexbert_core.schema import ConfigError


class Mapping(NamedTuple):
    """One architecture of transformers."""

    title: str
    architecture: str
    config_from: Callable[[Fields], dict[str, Any]]  # transformers config -> our config's fields
    config_to: Callable[[FlexBertConfig], dict[str, Any]]  # the inverse, for a config with these slots:
    slots: dict[str, str]
    prefix: str  # of the encoder's weights
    names: list[tuple[str, tuple[str, ...]]]  # ours, theirs: patterns of prefixes; several: ours are theirs joined
    repeats: dict[str, str]  # their names of weights that repeat another of theirs
    other: str  # pattern of their weights that serve another task, and of buffers


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


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def _common_from(fields: Fields) -> dict[str, Any]:
    return {name: fields[name] for name in (*SIZES, *TOKEN_IDS)}


def _common_to(config: FlexBertConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SIZES}


def _modernbert_from(fields: Fields) -> dict[str, Any]:
    layers = LayerFields(fields)
    global_theta, local_theta = layers.thetas()
    window = fields.number("local_attention", int) // 2
    heads = fields.number("num_attention_heads", int)
    # transformers 4 overlooks these, 5 takes some of them.
    fields.only(rope_scaling=None, rope_theta=global_theta, partial_rotary_factor=1.0, sliding_window=window)
    fields.only(head_dim=fields.number("hidden_size", int) // max(heads, 1))
    cutoff_factor = 3.0 if fields["initializer_cutoff_factor"] is None else fields.float("initializer_cutoff_factor")
    return {
        **_common_from(fields),
        "max_position_embeddings": fields["max_position_embeddings"],
        "embedding": {"name": "tokens", "norm": True, "dropout": fields.float("embedding_dropout")},
        "position": {
            "name": "rope",
            "global_theta": global_theta,
            "local_theta": local_theta,
            **layers.scaling(),
        },
        "attention": {
            "name": "multihead",
            "global_attn_every_n_layers": layers.period(),
            "window_per_side": window,
            "qkv_bias": fields.flag("attention_bias"),
            "out_bias": fields.flag("attention_bias"),
            "probs_dropout": fields.float("attention_dropout"),
            "out_dropout": fields.float("attention_dropout"),
        },
        "norm": {"name": "layernorm", "eps": fields.float("norm_eps"), "bias": fields.flag("norm_bias")},
        "mlp": {
            "name": "glu",
            "activation": _activation_from("hidden_activation", fields["hidden_activation"]),
            "in_bias": fields.flag("mlp_bias"),
            "out_bias": fields.flag("mlp_bias"),
            "inner_dropout": fields.float("mlp_dropout"),
        },
        "block": {"name": "prenorm", "skip_first_attention_norm": True},
        "head": {
            "name": "mlm",
            "activation": _activation_from("classifier_activation", fields["classifier_activation"]),
            "dense_bias": fields.flag("classifier_bias"),
            "decoder_bias": fields.flag("decoder_bias"),
        },
        "init": {
            "name": "full_megatron",
            "std": fields.float("initializer_range"),
            "cutoff_factor": cutoff_factor,
        },
    }


def _modernbert_to(config: FlexBertConfig) -> dict[str, Any]:
    attention, mlp = config.attention, config.mlp
    one_dropout = attention.probs_dropout == attention.out_dropout
    init = config.init.model_dump()
    return {
        **_common_to(config),
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


def _bert_from(fields: Fields, offset: int = 0) -> dict[str, Any]:
    """offset: rows of the position table before position 0."""
    fields.only(position_embedding_type="absolute")
    activation = _activation_from("hidden_act", fields["hidden_act"])
    out_dropout = fields.float("hidden_dropout_prob")
    biases = {"in_bias": True, "out_bias": True}
    return {
        **_common_from(fields),
        "max_position_embeddings": fields.number("max_position_embeddings", int) - offset,
        "embedding": {
            "name": "tokens",
            "token_types": fields.number("type_vocab_size", int),
            "norm": True,
            "dropout": out_dropout,
        },
        "position": {"name": "learned", "offset": offset},
        "attention": {
            "name": "multihead",
            "qkv_bias": True,
            "out_bias": True,
            "probs_dropout": fields.float("attention_probs_dropout_prob"),
            "out_dropout": out_dropout,
        },
        "norm": {"name": "layernorm", "eps": fields.float("layer_norm_eps"), "bias": True},
        "mlp": {"name": "mlp", "activation": activation, "out_dropout": out_dropout, **biases},
        "block": "postnorm",
        "head": {"name": "mlm", "activation": activation, "dense_bias": True, "decoder_bias": True},
        "init": {"name": "default", "std": fields.float("initializer_range")},
    }


def _bert_to(config: FlexBertConfig) -> dict[str, Any]:
    dropouts = {config.embedding.dropout, config.attention.out_dropout, config.mlp.out_dropout}
    return {
        **_common_to(config),
        "max_position_embeddings": config.max_position_embeddings + config.position.offset,
        "type_vocab_size": config.embedding.token_types or 1,  # transformers' BERT always looks one up
        "hidden_act": _activation_to(config.mlp.activation),
        "hidden_dropout_prob": dropouts.pop() if len(dropouts) == 1 else 0.0,
        "attention_probs_dropout_prob": config.attention.probs_dropout,
        "layer_norm_eps": config.norm.eps,
        "initializer_range": config.init.model_dump().get("std", 0.02),
    }


def _roberta_from(fields: Fields) -> dict[str, Any]:
    """Its position 0 is row pad_token_id + 1 of the table (fairseq's convention, kept by transformers)."""
    if fields["pad_token_id"] is None:
        raise ConfigError("pad_token_id: None of the Hugging Face config: RoBERTa's positions start behind it")
    head = {"name": "mlm", "activation": "gelu", "dense_bias": True, "decoder_bias": True}
    return {**_bert_from(fields, fields.number("pad_token_id", int) + 1), "head": head}


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
        {"decoder.weight": "model.embeddings.tok_embeddings.weight"},
        r"model\.layers\.\d+\.attn\.rotary_emb\.",
    ),
    "bert": Mapping(
        "BERT",
        "BertForMaskedLM",
        _bert_from,
        _bert_to,
        _BERT_SLOTS,
        "bert.",
        _bert_names("bert.", "cls.predictions.", "transform.dense", "transform.LayerNorm"),
        {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        r"cls\.seq_relationship\.|bert\.pooler\.|bert\.embeddings\.(position|token_type)_ids$",
    ),
    "roberta": Mapping(
        "RoBERTa",
        "RobertaForMaskedLM",
        _roberta_from,
        _bert_to,
        _BERT_SLOTS,
        "roberta.",
        _bert_names("roberta.", "lm_head.", "dense", "layer_norm"),
        {
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        },
        r"roberta\.pooler\.|roberta\.embeddings\.(position|token_type)_ids$",
    ),
}


def config_of(fields: Fields) -> dict[str, Any]:
    """The fields of our config that a transformers config says. Raises ConfigError for one without a counterpart."""
    fields.only(**ONLY)
    node = MAPPINGS[fields.model_type].config_from(fields)
    fields.refuse_unused()
    return node


def misfits(mapping: Mapping, config: FlexBertConfig, hf_config_of: Callable[..., Any]) -> list[str]:
    """What keeps a config from being this architecture, one line each: `field: value has no counterpart in ...`.

    hf_config_of: makes the transformers config that an export would have from the fields of `config_to`.
    """
    slots = {slot: name for slot, name in mapping.slots.items() if getattr(config, slot).name != name}
    if slots:
        pairs = [(slot, getattr(config, slot).name, name) for slot, name in slots.items()]
    else:
        try:
            back = _back(hf_config_of(**mapping.config_to(config)))
        except ConfigError as error:
            return [str(error)]
        ours, theirs = _function(config.to_dict()), _function(back.to_dict())
        pairs = [(field, ours.get(field), theirs.get(field)) for field in sorted(ours.keys() | theirs.keys())]
    return [
        f"{field}: {mine!r} has no counterpart in Hugging Face's {mapping.title}, only {other!r}"
        for field, mine, other in pairs
        if mine != other
    ]


def at_padding_id(config: FlexBertConfig, pad_token_id: int | None) -> FlexBertConfig:
    """The config with the position offset that Hugging Face's RoBERTa has with this padding id, for one that is RoBERTa
    but for that; any other config as it is, and one whose table would more than double."""
    from transformers import AutoConfig

    pad, position = pad_token_id, config.position
    if pad is None or pad > config.max_position_embeddings or position.name != "learned" or not position.offset:
        return config
    moved = config.model_copy(update={"position": position.model_copy(update={"offset": pad + 1})})

    def of(**fields: Any) -> Any:
        return AutoConfig.for_model("roberta", **fields, pad_token_id=pad)

    return config if moved == config or misfits(MAPPINGS["roberta"], moved, of) else moved


def lost_dropouts(config: FlexBertConfig, hf_config: Any) -> list[str]:
    """`slot.field` of each dropout that is another one in the config of an export."""
    ours, theirs = leaves(config.to_dict()), leaves(_back(hf_config).to_dict())
    return [name for name, value in ours.items() if name.endswith("dropout") and theirs.get(name) != value]


def _back(hf_config: Any) -> FlexBertConfig:
    node = config_of(Fields(hf_config.model_type, hf_config.to_dict()))
    return FlexBertConfig.from_dict({name: value for name, value in node.items() if name not in TOKEN_IDS})


def _function(node: dict[str, Any]) -> dict[str, Any]:
    """`slot.field` -> value of everything that trained weights' function depends on."""
    flat = leaves({name: value for name, value in node.items() if name not in _NOT_THE_FUNCTION})
    fields = {name: name.split(".")[-1] for name in flat}
    return {
        name: flat[name]
        for name, field in fields.items()
        if field not in _NOT_THE_FUNCTION and not field.endswith("dropout")
    }
