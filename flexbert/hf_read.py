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
        _check_own(node)
        return SimpleNamespace(model_type="flexbert", flexbert=node["flexbert"])
    with _library("config.json: transformers cannot load it"):
        return AutoConfig.from_pretrained(folder, local_files_only=True)


def _check_own(node: dict[str, Any]) -> None:
    """Raise ConfigError where our own export's config.json says something else beside `flexbert` than in it: a resized
    vocabulary that an older modeling file saved, or an edit by hand of one of the two."""
    from flexbert.modeling_flexbert import sizes_of

    ours = node["flexbert"]
    for name, size in (sizes_of(ours) if isinstance(ours, dict) else {}).items():
        if node.get(name, size) != size:
            raise ConfigError(f"config.json: {name}: {node[name]!r}, but flexbert says {size!r}: they must agree")


def _weight_files(folder: Path) -> list[str]:
    """Of one of our own exports: what the index of a save in several files lists, else the one file.

    Raises ConfigError for an index that is damaged, or that names a file elsewhere.
    """
    index = "model.safetensors.index.json"
    if not (folder / index).is_file() or (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    with _library(f"{index}: cannot be read"):
        names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
    for name in names:
        if name != Path(name).name:
            raise ConfigError(f"{index}: {name!r}: not a file of this folder")
    return names


def read_weights(folder: Path, hf_config: Any, mapping: Mapping | None, task: str) -> dict[str, Tensor]:
    """The weights of a folder, float32: of our own exports as they are, else under the names that transformers' model
    for the task has. Raises ConfigError for damaged files, and for weights that are missing, left over or of a shape
    other than the config's."""
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoModelForMaskedLM

    if mapping is None:
        state: dict[str, Tensor] = {}
        for name in _weight_files(folder):
            with _library(f"{name}: cannot be read"):
                state |= load_file(folder / name)
        return state
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
