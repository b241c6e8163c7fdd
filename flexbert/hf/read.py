"""What a folder or a model of transformers holds: its fields and weights, or one line that says what is wrong."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flexbert.hf.fields import Fields
from flexbert.hf.mappings import MAPPINGS, SIZES
from flexbert.hf.state import float_state
from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import ConfigError

log = logging.getLogger(__name__)

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


class OwnFields:
    """What the config of our own export says, written by `to_hf` or saved again by transformers."""

    model_type = "flexbert"

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given
        self.parts: dict[str, str] = given.get("parts") or {}
        """Files of parts from outside -> sha256."""
        if not isinstance(self.parts, dict) or not all(isinstance(each, str) for each in self.parts.values()):
            raise ConfigError("config.json: parts: expected the sha256 of each file, by its name")

    def node(self) -> Any:
        """The architecture; transformers keeps the size of a resized vocabulary beside it. Raises ConfigError for
        another size that differs there."""
        node = self.given["flexbert"]
        if not isinstance(node, dict):
            return node
        for name in (*SIZES, "max_position_embeddings"):
            if name != "vocab_size" and name in node and self.given.get(name, node[name]) != node[name]:
                raise ConfigError(
                    f"config.json: {name}: {self.given[name]!r} contradicts flexbert.{name}, {node[name]!r}, which is "
                    "what the model is built from: make them equal"
                )
        return {**node, "vocab_size": self.given.get("vocab_size", node.get("vocab_size"))}


@contextmanager
def _library(fault: str) -> Iterator[None]:
    """Turn what json and safetensors raise into a ConfigError of one line, `fault: what they said`.

    For nothing but their calls: they tell of bad input by almost every kind of exception.
    """
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{fault}: {said or type(error).__name__}") from error


def fields_of(given: dict[str, Any]) -> Fields | OwnFields:
    """The fields of a transformers config, of an architecture that is known here."""
    model_type = given.get("model_type")
    if model_type == "flexbert":
        if "flexbert" not in given:
            raise ConfigError("config.json: flexbert: is missing, the architecture of our own exports: export again")
        return OwnFields(given)
    if not isinstance(model_type, str) or model_type not in MAPPINGS:
        raise ConfigError(f"model_type: {model_type!r} is not known, {did_you_mean('', [*MAPPINGS, 'flexbert'])}")
    return Fields(model_type, given)


def read_fields(folder: Path) -> Fields | OwnFields:
    """From a folder's config.json. Raises ConfigError when there is none, it is damaged or not of a known class."""
    adapter = (folder / "adapter_config.json").is_file()
    if not (folder / "config.json").is_file():
        if adapter:
            raise ConfigError(
                "adapter_config.json: only an adapter is in it: merge it into its base model and save that"
            )
        fault = "no config.json in it" if folder.is_dir() else "no such folder (nothing is downloaded)"
        raise ConfigError(f"{fault}: expected a folder written by save_pretrained")
    if adapter:
        raise ConfigError("adapter_config.json: an adapter lies beside the weights: merge the two, or move it away")
    given = _read_json(folder / "config.json")
    fields = fields_of(given)
    if isinstance(fields, Fields):
        _check_class(given, MAPPINGS[fields.model_type].architecture)
    return fields


def _check_class(given: dict[str, Any], architecture: str) -> None:
    """Raise ConfigError where the weights are of another class than transformers has for this type of model."""
    kind = architecture.removesuffix("ForMaskedLM")
    names = given.get("architectures") or []
    for name in names if isinstance(names, list) else [names]:
        if not re.fullmatch(rf"(TF|Flax)?{kind}(Model|LMHeadModel|For\w+)", str(name)):
            raise ConfigError(f"architectures: {name!r} is no class of transformers' {kind}: its function is not known")
    own = given.get("auto_map")
    for name in ("AutoConfig", "AutoModel", "AutoModelForMaskedLM"):
        if isinstance(own, dict) and name in own:
            raise ConfigError(
                f"auto_map: {name} is code of the folder, {own[name]!r}, which is not run here and may compute "
                f"something else than transformers' {kind}: delete the key if it does not"
            )


def _read_json(file: Path) -> dict[str, Any]:
    with _library(f"{file.name}: cannot be read"):
        node = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(node, dict):
        raise ConfigError(f"{file.name}: expected a mapping of keys to values, got {type(node).__name__}")
    return node


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder, in one file or several, as they are. Raises ConfigError for files that are damaged,
    missing, ambiguous or pickled."""
    index = folder / _INDEX
    files = _indexed(index) if index.is_file() else {_WEIGHTS: None}
    if index.is_file() and (folder / _WEIGHTS).is_file() and _WEIGHTS not in files:
        raise ConfigError(f"{_WEIGHTS}: and {_INDEX} name different files with weights: remove those that do not count")
    if not index.is_file() and not (folder / _WEIGHTS).is_file():
        pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        hint = f", only {pickled[0]}: a pickle could run code, so save the model with safetensors" if pickled else ""
        raise ConfigError(f"{_WEIGHTS}: there is none{hint}")
    unread = sorted({path.name for path in folder.glob("*.safetensors")} - files.keys())
    if unread:
        log.warning("%s: not read, since they are not the model's: %s", folder, ", ".join(unread))
    state: dict[str, Tensor] = {}
    for name, expected in sorted(files.items()):
        state |= _read_file(folder / name, expected)
    return float_state(state)


def _indexed(index: Path) -> dict[str, set[str] | None]:
    """File -> names of the weights that the index has in it."""
    node = _read_json(index).get("weight_map")
    files: dict[str, set[str] | None] = {}
    if not isinstance(node, dict) or not node:
        raise ConfigError(f"{_INDEX}: weight_map: expected names of weights with their files, got {node!r}")
    for name, file in node.items():
        if not isinstance(file, str) or Path(file).name != file or not (index.parent / file).is_file():
            raise ConfigError(f"{_INDEX}: {name}: its file {file!r} is not in the folder")
        names = files.setdefault(file, set())
        assert names is not None
        names.add(name)
    return files


def _read_file(file: Path, expected: set[str] | None) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    with _library(f"{file.name}: cannot be read"):
        state = load_file(file)
    for name in sorted(state.keys() ^ expected) if expected is not None else []:
        fault = "is not named by" if name in state else f"should be in {file.name} by"
        raise ConfigError(f"{name}: {fault} {_INDEX}: the files are of different models")
    return state


def read_model(model: Any) -> tuple[Fields | OwnFields, dict[str, Tensor]]:
    """Of a transformers model in memory. Raises ConfigError for what is none, and for adapters and quantized ones."""
    model = getattr(model, "_orig_mod", model)  # compiled
    if not isinstance(model, nn.Module) or not hasattr(getattr(model, "config", None), "model_type"):
        raise ConfigError(f"{type(model).__name__}: expected a folder, or a model of transformers")
    config: Any = model.config
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError("the model has adapters: merge them into its weights (merge_and_unload) or unload them")
    if getattr(model, "is_quantized", False):
        raise ConfigError("the model is quantized: dequantize it, or load it without quantization_config")
    fields = fields_of(config.to_dict())
    if isinstance(fields, Fields) and not type(model).__module__.startswith("transformers.models."):
        log.warning("%s: is no class of transformers: its weights are taken, its code is not", type(model).__name__)
    if hooked := [name or "model" for name, module in model.named_modules() if _hooks(module)]:
        log.warning("hooks are left out: of %s", ", ".join(hooked))
    return fields, float_state(model.state_dict())


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
