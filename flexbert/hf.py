"""To and from Hugging Face transformers.

hf_mappings.py says which architectures it has a class for; the others travel with modeling_flexbert.py.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from durable import new_folder
from flexbert.config import TOKEN_IDS, FlexBertConfig
from flexbert.encoder import FlexBertEncoder
from flexbert.hf_mappings import MAPPINGS, Mapping, from_hf_state, misfits, to_hf_state
from flexbert.hf_read import mapping_of, read_config, read_weights
from flexbert.hf_verify import verify_export
from flexbert.model import FlexBertForMaskedLM, build
from schema import ConfigError, named, validate

log = logging.getLogger(__name__)

MODELING_FILE = Path(__file__).with_name("modeling_flexbert.py")


@overload
def from_hf(source: str | Path | Any, task: Literal["mlm"] = "mlm") -> FlexBertForMaskedLM: ...
@overload
def from_hf(source: str | Path | Any, task: Literal["encoder"]) -> FlexBertEncoder: ...
def from_hf(source: str | Path | Any, task: str = "mlm") -> FlexBertForMaskedLM | FlexBertEncoder:
    """A model with the weights of a transformers model, or of a folder that holds one in safetensors.

    source: BERT, RoBERTa, ModernBERT, or what `to_hf` wrote (its modeling file is not run). task: "mlm", or "encoder"
    for models without a masked-token head, or to leave it out; poolers and other tasks' heads are left out.
    Weights are copied, as float32. Nothing is downloaded, no code from the folder runs. Raises ConfigError naming the
    field when the architecture cannot be expressed, or when weights are missing, left over or of another shape.
    """
    if task not in ("mlm", "encoder"):
        raise ConfigError(f"task: {task!r}: transformers' weights are for mlm or encoder")
    if isinstance(source, str | Path):
        folder = Path(source)
        with named(folder):
            config = read_config(folder)
            return _converted(config, lambda mapping: read_weights(folder, config, mapping, task), task, "config.json")
    model = source.base_model if task == "encoder" else source
    return _converted(model.config, lambda _: model.state_dict(), task, "model")


def _converted(
    hf_config: Any, weights_of: Callable[[Mapping | None], dict[str, Tensor]], task: str, place: str
) -> FlexBertForMaskedLM | FlexBertEncoder:
    """The model of a transformers config. place: of the config, in messages. The weights are asked for, and read, once
    the config is known to make sense here."""
    mapping = mapping_of(hf_config.model_type)
    node = hf_config.flexbert if mapping is None else mapping.config_from(hf_config)
    with torch.device("meta"):
        result: Any = build(validate(FlexBertConfig, node, place), task)  # pyright: ignore[reportCallIssue, reportArgumentType]
    wanted = result.state_dict()
    given = weights_of(mapping)
    if mapping is None:
        state = _own_state(given, list(wanted), task)
    else:
        prefix = mapping.prefix if task == "encoder" else ""
        given = {f"{prefix}{name}": tensor for name, tensor in given.items()}
        ours = [f"encoder.{name}" if task == "encoder" else name for name in wanted]
        state = dict(zip(wanted, from_hf_state(mapping, given, ours).values(), strict=True))
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)} in the weights, {tuple(wanted[name].shape)} by the config"
            raise ConfigError(f"{name}: {shapes}: they are of different models")
    result.load_state_dict(state, assign=True)
    return result


def _own_state(given: dict[str, Tensor], wanted: list[str], task: str) -> dict[str, Tensor]:
    """Weights that already have our names: of a whole model, or, without `encoder.`, of an encoder."""
    if task == "encoder":
        given = {name.removeprefix("encoder."): tensor for name, tensor in given.items()}
        given = {name: tensor for name, tensor in given.items() if not name.startswith("head.")}
    if odd := sorted(given.keys() ^ set(wanted)):
        raise ConfigError(f"{odd[0]}: {'missing' if odd[0] in wanted else 'has no place'} in this model")
    return {name: given[name].to("cpu", torch.float32, copy=True) for name in wanted}


def to_hf(model: FlexBertForMaskedLM, tokenizer: Any, out_dir: str | Path, card: str | None = None) -> None:
    """Write a folder that transformers loads: config.json, model.safetensors, the tokenizer, README.md.

    An architecture without a class in transformers also gets modeling_flexbert.py, for trust_remote_code=True.
    tokenizer: a transformers tokenizer, or a folder that AutoTokenizer loads; its special ids go into the config.
    card: text of README.md; default: what the architecture alone tells. The folder is written beside `out_dir`, loaded
    back by transformers (in a process without FlexBERT, if it carries code), its logits compared with `model`'s
    (float32, within 1e-4), and only then renamed to `out_dir`; an earlier export there is replaced, anything else
    refused.
    Raises ConfigError for a component from outside the package (naming it), a tokenizer that does not fit or an
    `out_dir` that is something else; RunError when the logits differ. Then nothing new is under `out_dir`.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and not all((out_dir / name).is_file() for name in ("config.json", "model.safetensors")):
        raise ConfigError(f"{out_dir}: exists and is not an export: choose another folder, or remove it")
    tokenizer = _load_tokenizer(tokenizer)
    state = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in model.state_dict().items()}
    hf_config, mapping = _hf_config(model.config, _token_ids(model.config, tokenizer))
    if mapping is not None:
        state = to_hf_state(mapping, state)

    from safetensors.torch import save_file

    with new_folder(out_dir) as folder:
        hf_config.save_pretrained(folder)
        if mapping is None:
            shutil.copy(MODELING_FILE, folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(folder)
        title = "FlexBERT" if mapping is None else mapping.title
        (folder / "README.md").write_text(card if card is not None else default_card(model, out_dir.name, title))
        verify_export(model, folder, hf_config.pad_token_id, carries_code=mapping is None)


def _hf_config(config: FlexBertConfig, ids: dict[str, int | None]) -> tuple[Any, Mapping | None]:
    """The config to export, and how weights are renamed; None: they keep our names, for modeling_flexbert.py.

    Raises ConfigError for a component that neither transformers nor the modeling file has.
    """
    from transformers import AutoConfig

    common = {"dtype": "float32", **ids}
    reasons = []
    for name, mapping in MAPPINGS.items():

        def of(name: str = name, mapping: Mapping = mapping, **fields: Any) -> Any:
            return AutoConfig.for_model(name, **{**fields, **common}, architectures=[mapping.architecture])

        faults = misfits(mapping, config, of)
        if not faults:
            return of(**mapping.config_to(config)), mapping
        reasons.append(faults[0])
    check_exportable(config)
    log.info("the export carries its own modeling file: %s", "; ".join(reasons))
    from flexbert import modeling_flexbert

    node = config.to_dict()
    node["init"] = {"name": "default"}  # says nothing about trained weights, and may name a folder of this machine
    sizes = {name: value for name, value in node.items() if isinstance(value, int) and name not in TOKEN_IDS}
    names = {
        "AutoConfig": "FlexBertConfig",
        "AutoModel": "FlexBertModel",
        "AutoModelForMaskedLM": "FlexBertForMaskedLM",
    }
    hf_config = modeling_flexbert.FlexBertConfig(
        node,
        **sizes,
        **common,
        auto_map={auto: f"modeling_flexbert.{name}" for auto, name in names.items()},
        architectures=["FlexBertForMaskedLM"],
        tie_word_embeddings=config.head.tied,
    )
    return hf_config, None


def carries_code(config: FlexBertConfig) -> bool:
    """Whether an export of this architecture brings its own modeling file, for trust_remote_code=True. Raises
    ConfigError as `to_hf` does."""
    return _hf_config(config, {})[1] is None


def check_exportable(config: FlexBertConfig) -> None:
    """Raise ConfigError for a component registered outside the package: an export could not compute it."""
    from flexbert import modeling_flexbert

    def check(node: dict[str, Any], place: str) -> None:
        for slot, value in node.items():
            where = f"{place}{slot}"
            kind = "norm" if slot.endswith("norm") else slot
            if slot == "activation" and value not in modeling_flexbert.ACTIVATIONS:
                raise ConfigError(f"{where}: {value!r} is not in the modeling file that exports carry: {MODELING_FILE}")
            if not isinstance(value, dict):
                continue
            if kind in modeling_flexbert.SUPPORTED and value["name"] not in modeling_flexbert.SUPPORTED[kind]:
                name = value["name"]
                raise ConfigError(f"{where}: {name!r} is not in the modeling file that exports carry: {MODELING_FILE}")
            check(value, f"{where}.")

    check(config.to_dict(), "")


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


def default_card(model: FlexBertForMaskedLM, name: str, title: str) -> str:
    """README.md of an export: what the architecture tells, and how to load it."""
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trust = ", trust_remote_code=True" if title == "FlexBERT" else ""
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
---

# {name}

A masked language model of the {title} architecture, pretrained with FlexBERT.

| | |
|---|---|
| parameters | {parameters:,} |
| layers, width, heads | {config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads} |
| vocabulary | {config.vocab_size:,} |
| longest sequence | {config.max_position_embeddings:,} tokens |

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

model = AutoModelForMaskedLM.from_pretrained("{name}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""
