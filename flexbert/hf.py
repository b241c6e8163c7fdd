"""To and from Hugging Face transformers. The only module that imports it, and only when called.

| model_type | class |
|---|---|
| modernbert | ModernBertForMaskedLM |

Dropout acts in training only, so an export that cannot express a site says 0 there: Hugging Face's ModernBERT has one
`attention_dropout` for two sites and none after the mlp.
"""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flexbert.config import TOKEN_IDS, FlexBertConfig
from flexbert.export import publish
from flexbert.model import FlexBertForMaskedLM, build
from schema import ConfigError, RunError, did_you_mean

log = logging.getLogger(__name__)

# Largest difference between our logits and the export's: float32, other kernels; measured below 1e-5 on every preset.
LOGIT_TOLERANCE = 1e-4


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


def _theirs(mapping: Mapping, name: str) -> str:
    for ours, theirs in mapping.names:
        if re.match(ours, name):
            return re.sub(rf"^{ours}", theirs, name)
    raise AssertionError(f"no Hugging Face name for {name}")


def from_hf(source: str | Path | Any) -> FlexBertForMaskedLM:
    """A model with the weights of a transformers ...ForMaskedLM object, or of a folder that holds one in safetensors.

    Weights are copied, as float32. Nothing is downloaded. Raises ConfigError naming the field when the architecture
    cannot be expressed, or when weights are missing or left over.
    """
    theirs_model: Any = _load_folder(Path(source)) if isinstance(source, str | Path) else source
    mapping = MAPPINGS.get(theirs_model.config.model_type)
    if mapping is None:
        raise ConfigError(f"model_type: {theirs_model.config.model_type!r} is not known, {did_you_mean('', MAPPINGS)}")
    config = FlexBertConfig.from_dict(mapping.config_from(theirs_model.config))
    model = _on_meta(config)
    given = theirs_model.state_dict()
    state = {}
    for name in model.state_dict():
        theirs = _theirs(mapping, name)
        if theirs not in given:
            raise ConfigError(f"{theirs}: missing in the Hugging Face weights of {type(theirs_model).__name__}")
        state[name] = given.pop(theirs).to("cpu", torch.float32, copy=True)
    left_over = sorted(name for name in given if name != "decoder.weight")  # tied to the token table
    if left_over:
        raise ConfigError(f"{left_over[0]}: has no place in this masked language model")
    model.load_state_dict(state, assign=True)
    return model


def _on_meta(config: FlexBertConfig) -> FlexBertForMaskedLM:
    with torch.device("meta"):
        return build(config)


def _load_folder(folder: Path) -> Any:
    from transformers import AutoModelForMaskedLM

    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: no config.json in it: expected a folder written by save_pretrained")
    try:
        with torch.random.fork_rng(devices=[]):
            # No pickle: a folder from elsewhere could run code through it.
            return AutoModelForMaskedLM.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: transformers cannot load it: {str(error).splitlines()[0]}") from None


def to_hf(model: FlexBertForMaskedLM, tokenizer: Any, out_dir: str | Path, card: str | None = None) -> None:
    """Write a folder that transformers loads: config.json, model.safetensors, the tokenizer, README.md.

    tokenizer: a transformers tokenizer, or a folder that AutoTokenizer loads; its special ids go into the config.
    card: text of README.md; default: what the architecture alone tells. The folder is written beside `out_dir`, loaded
    back by transformers, its logits compared with `model`'s (float32, within 1e-4), and only then renamed to `out_dir`;
    an earlier export there is replaced, anything else refused.
    Raises ConfigError for an architecture without counterpart (naming the field), a tokenizer that does not fit or an
    `out_dir` that is something else; RunError when the logits differ. Then nothing new is under `out_dir`.
    """
    from transformers import AutoConfig

    mapping_name, mapping = next(iter(MAPPINGS.items()))
    config = model.config
    fields = mapping.config_to(config)
    tokenizer = _load_tokenizer(tokenizer)
    fields |= _token_ids(config, tokenizer)
    hf_config = AutoConfig.for_model(mapping_name, **fields, architectures=[mapping.architecture], dtype="float32")
    state = {
        _theirs(mapping, name): tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in model.state_dict().items()
    }

    def write(folder: Path) -> None:
        from safetensors.torch import save_file

        hf_config.save_pretrained(folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card if card is not None else default_card(model, Path(out_dir).name))
        _verify(model, folder)

    publish(Path(out_dir), write)


def _load_tokenizer(tokenizer: Any) -> Any:
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    from transformers import AutoTokenizer

    if not Path(tokenizer).is_dir():
        raise ConfigError(f"tokenizer: {tokenizer}: no such folder")
    try:
        return AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer: {tokenizer}: cannot be loaded: {str(error).splitlines()[0]}") from None


def _token_ids(config: FlexBertConfig, tokenizer: Any) -> dict[str, int | None]:
    """The ids for config.json. Raises ConfigError for a tokenizer with more entries than the model."""
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"vocab_size: {config.vocab_size} is less than the {len(tokenizer)} entries of the tokenizer: not its model"
        )
    ids: dict[str, int | None] = {}
    for name in TOKEN_IDS:
        ours, theirs = getattr(config, name), getattr(tokenizer, name, None)
        if ours is not None and theirs is not None and ours != theirs:
            # The model itself uses none of these ids, so a finished run need not fail over them.
            log.warning(
                "%s: %d in the model's config, %d in the tokenizer: exported as the tokenizer's", name, ours, theirs
            )
        ids[name] = ours if theirs is None else theirs
    for name, stand_in in (("bos_token_id", "cls_token_id"), ("eos_token_id", "sep_token_id")):
        if ids[name] is None:
            ids[name] = ids[stand_in]
    return ids


@torch.no_grad()
def _verify(model: FlexBertForMaskedLM, folder: Path) -> None:
    """Raise RunError unless transformers loads `folder` and gives `model`'s logits, one sequence at a time."""
    from transformers import AutoTokenizer

    config = model.config
    # In float32 on the CPU like the export, whatever the model was trained with
    attention = {**config.attention.model_dump(), "backend": "sdpa"}
    reference = _on_meta(FlexBertConfig.from_dict({**config.to_dict(), "attention": attention})).eval()
    state = {name: tensor.to("cpu", torch.float32) for name, tensor in model.state_dict().items()}
    reference.load_state_dict(state, assign=True)
    exported = _load_folder(folder).eval()
    window = config.attention.window_per_side
    lengths = [min(length, config.max_position_embeddings) for length in (1, 7, 33, 2 * window + 9)]
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, config.vocab_size, (sum(lengths),), generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    ours = reference(input_ids, cu_seqlens, max(lengths)).logits
    theirs = torch.cat([exported(input_ids=ids[None]).logits[0] for ids in input_ids.split(lengths)])
    difference = float((ours - theirs).abs().max())
    if not difference <= LOGIT_TOLERANCE:  # not `>`: NaN must fail too
        raise RunError(f"{folder}: the export's logits differ from the model's by {difference:.2e}: not published")
    if len(AutoTokenizer.from_pretrained(folder, local_files_only=True)) > config.vocab_size:
        raise RunError(f"{folder}: the tokenizer read back has more entries than the model: not published")


def default_card(model: FlexBertForMaskedLM, name: str) -> str:
    """README.md of an export: what the architecture tells, and how to load it."""
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
---

# {name}

A masked language model of the ModernBERT architecture, pretrained with FlexBERT.

| | |
|---|---|
| parameters | {parameters:,} |
| layers, width, heads | {config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads} |
| vocabulary | {config.vocab_size:,} |
| longest sequence | {config.max_position_embeddings:,} tokens |

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

model = AutoModelForMaskedLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""
