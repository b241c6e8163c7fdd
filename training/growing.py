"""The model that `model.init.from` names: an export, or a checkpoint in a run's folder, of which the library knows
nothing."""

import json
from pathlib import Path
from typing import Literal

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from flexbert import FlexBertConfig, FlexBertForMaskedLM, build, from_hf
from flexbert.config import without_init
from flexbert.growing import Grow
from flexbert_core.composing import load_node
from flexbert_core.schema import ConfigError, named, validate
from recipe.config import RunConfig, read_recorded_config
from recipe.phases import PhasePlan
from training.checkpoints.sharded import load_weights, unshared


def check_source(config: FlexBertConfig) -> None:
    """Raise ConfigError, starting with `init.from`, when the model grows from a folder that is no source."""
    if isinstance(config.init, Grow.Config):
        with named("init.from"):
            _kind(Path(config.init.source))


def read_source(config: FlexBertConfig) -> FlexBertForMaskedLM | None:
    """What `build` grows this model from; None when it starts fresh.

    Raises ConfigError, starting with `init.from`, for a source that is neither kind, damaged, or not what the config
    beside it says.
    """
    if not isinstance(config.init, Grow.Config):
        return None
    folder = Path(config.init.source)
    with named("init.from"):
        if _kind(folder) == "export":
            return from_hf(folder)
        weights = _checkpoint_weights(folder)
        file = folder.parent.parent / "config.yaml"
        run = load_node(file)
        if "model" not in run:
            raise ConfigError(f"{file}: model: is missing: expected the config.yaml that the run wrote")
        with named(file):
            source = validate(FlexBertConfig, run["model"], "model")
        if "phases" in run:
            source = _as_trained(source, read_recorded_config(file), folder)
        model = build(without_init(source))
        for name, parameter in unshared(model).items():
            if name not in weights or weights[name].shape != parameter.shape:
                fault = "has another shape" if name in weights else "is missing"
                raise ConfigError(f"{folder}: {name}: {fault} there, by the config beside it: take another source")
        load_weights(model, {name: weights[name] for name in unshared(model)})
    return model


def _as_trained(model: FlexBertConfig, run: RunConfig, folder: Path) -> FlexBertConfig:
    """The model with the RoPE thetas of the phase that trained this checkpoint."""
    file = folder / "state.json"
    try:
        step = int(json.loads(file.read_text())["run"]["step"])
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(f"{file}: damaged: take another checkpoint") from None
    phase = PhasePlan(run).at(max(step - 1, 0))
    thetas = {"global_theta": phase.theta_global, "local_theta": phase.theta_local}
    given = {name: theta for name, theta in thetas.items() if theta is not None}
    return model.model_copy(update={"position": model.position.model_copy(update=given)})


def _kind(folder: Path) -> Literal["export", "checkpoint"]:
    try:
        if (folder / "config.json").is_file():
            return "export"
        if (folder / "manifest.json").is_file():
            return "checkpoint"
    except OSError as error:  # a name that no file can have
        raise ConfigError(f"{folder}: {error.strerror}") from None
    raise ConfigError(
        f"{folder}: neither an export (config.json) nor a checkpoint (manifest.json): name one of a run's "
        "exports/tokens-N or checkpoints/tokens-N"
    )


def _checkpoint_weights(folder: Path) -> dict[str, Tensor]:
    file = folder / "manifest.json"
    try:
        expected = json.loads(file.read_text())["files"]["model.safetensors"]["xxh3_64"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(f"{file}: damaged: take another checkpoint") from None
    file = folder / "model.safetensors"
    try:
        data = file.read_bytes()
        if xxhash.xxh3_64_hexdigest(data) != expected:
            raise ConfigError(f"{file}: damaged: take another checkpoint")
        return load(data)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}: take another checkpoint") from None
