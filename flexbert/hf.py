"""To and from Hugging Face transformers. The only module that imports it, and only when called.

hf_mappings.py says which architectures there are.
"""

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from durable import new_folder
from flexbert.attention import MultiHeadAttention
from flexbert.config import TOKEN_IDS, FlexBertConfig
from flexbert.hf_mappings import MAPPINGS, hf_name
from flexbert.model import FlexBertForMaskedLM, build
from schema import ConfigError, RunError, did_you_mean

log = logging.getLogger(__name__)

# Largest difference between our logits and the export's: float32, other kernels; measured below 1e-5 on every preset.
LOGIT_TOLERANCE = 1e-4


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
        theirs = hf_name(mapping, name)
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

    out_dir = Path(out_dir)
    if out_dir.exists() and not all((out_dir / name).is_file() for name in ("config.json", "model.safetensors")):
        raise ConfigError(f"{out_dir}: exists and is not an export: choose another folder, or remove it")
    mapping_name, mapping = next(iter(MAPPINGS.items()))
    config = model.config
    fields = mapping.config_to(config)
    tokenizer = _load_tokenizer(tokenizer)
    fields |= _token_ids(config, tokenizer)
    hf_config = AutoConfig.for_model(mapping_name, **fields, architectures=[mapping.architecture], dtype="float32")
    state = {
        hf_name(mapping, name): tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in model.state_dict().items()
    }

    from safetensors.torch import save_file

    with new_folder(out_dir) as folder:
        hf_config.save_pretrained(folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card if card is not None else default_card(model, out_dir.name))
        _verify(model, folder)


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
            log.warning("%s: %d in the model, %d in the tokenizer: exported as the tokenizer's", name, ours, theirs)
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
    # The model as it is, not as its config says, but in float32 on the CPU like the export
    weights = {id(weight): nn.Parameter(weight.detach().to("cpu", torch.float32)) for weight in model.parameters()}
    reference = copy.deepcopy(model, weights).eval()
    for module in reference.modules():
        if isinstance(module, MultiHeadAttention):
            module.config = module.config.model_copy(update={"backend": "sdpa"})
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
