"""What a folder of transformers holds: its config and weights, or one line that says what is wrong with it."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from flexbert.hf_mappings import MAPPINGS, Mapping
from schema import ConfigError, did_you_mean


@contextmanager
def _library(fault: str) -> Iterator[None]:
    """Turn what transformers and safetensors raise into a ConfigError of one line, `fault: what they said`.

    For nothing but their calls: they tell of bad input by almost every kind of exception.
    """
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{fault}: {said or type(error).__name__}") from error


def mapping_of(model_type: Any) -> Mapping | None:
    """None: what `to_hf` writes with its modeling file, under our own names. Raises ConfigError for another one."""
    if model_type == "flexbert":
        return None
    if str(model_type) not in MAPPINGS:
        raise ConfigError(f"model_type: {model_type!r} is not known, {did_you_mean('', [*MAPPINGS, 'flexbert'])}")
    return MAPPINGS[model_type]


def read_config(folder: Path) -> Any:
    """The transformers config of a folder; of our own exports, an object with their two fields that count.

    Raises ConfigError when there is none, or it is damaged.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ConfigError("no config.json in it: expected a folder written by save_pretrained")
    with _library("config.json: cannot be read"):
        node = json.loads((folder / "config.json").read_text())
    if not isinstance(node, dict):
        raise ConfigError(f"config.json: expected a mapping of keys to values, got {type(node).__name__}")
    if mapping_of(node.get("model_type")) is None:
        if "flexbert" not in node:
            raise ConfigError("config.json: flexbert: is missing, the architecture of our own exports: export again")
        return SimpleNamespace(model_type="flexbert", flexbert=node["flexbert"])
    with _library("config.json: transformers cannot load it"):
        return AutoConfig.from_pretrained(folder, local_files_only=True)


def read_weights(folder: Path, hf_config: Any, mapping: Mapping | None, task: str) -> dict[str, Tensor]:
    """The weights of a folder, float32: of our own exports as they are, else under the names that transformers' model
    for the task has. Raises ConfigError for damaged files, and for weights that are missing, left over or of a shape
    other than the config's."""
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoModelForMaskedLM

    if mapping is None:
        with _library("model.safetensors: cannot be read"):
            return load_file(folder / "model.safetensors")
    with _library("transformers cannot load it"), torch.random.fork_rng(devices=[]):
        # No pickle: a folder from elsewhere could run code through it.
        loader = AutoModelForMaskedLM if task == "mlm" else AutoModel
        model, info = loader.from_pretrained(
            folder,
            config=hf_config,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="eager",  # it never runs; ModernBERT would take flash-attn, and warn of float32
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else its error does not say of which layer
        )
    # transformers fills what is missing or does not fit with random numbers, drops what is left over, and only warns
    for name in sorted(info["mismatched_keys"]):
        shape = tuple(model.get_parameter(name).shape)
        raise ConfigError(f"{name}: not {shape} in the weights, as config.json has it: they are of different models")
    if missing := [name for name in info["missing_keys"] if _counts(name, mapping, task)]:
        hint = "" if task == "encoder" else ": an encoder without a masked-token head loads with task='encoder'"
        raise ConfigError(f"{sorted(missing)[0]}: missing in the weights{hint}")
    parts = [name for name, _ in model.base_model.named_children()]
    for name in sorted(info["unexpected_keys"]):
        of_encoder = name.removeprefix(mapping.prefix).split(".")[0] in parts
        if _counts(name, mapping, task) and (of_encoder or task == "mlm"):
            raise ConfigError(f"{name}: has no place in the model that config.json describes: use the weights' own")
    return model.state_dict()


def _counts(name: str, mapping: Mapping, task: str) -> bool:
    """Whether a weight under transformers' name (without the encoder's prefix, for task encoder) matters here."""
    prefix = mapping.prefix if task == "encoder" and not name.startswith(mapping.prefix) else ""
    return not re.match(mapping.ignored, prefix + name)
