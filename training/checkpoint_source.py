"""A checkpoint as a model: the architecture that its run records, its weights, and a folder for transformers."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import flexbert
from data.feed.loader import tokenizer_folder
from flexbert import FlexBertConfig, FlexBertForMaskedLM, build
from flexbert.config import without_init
from flexbert.hf.parts import outside
from flexbert_core.folders import what_it_is
from flexbert_core.schema import ConfigError, RunError
from recipe.config import RunConfig, read_recorded_config
from recipe.origin import read_origin_record
from recipe.phases import PhasePlan
from training import report
from training.checkpoints.files import verify_checkpoint
from training.objectives.phases import PARTS

WEIGHTS = "model.safetensors"
_STATE = "state.json"


@dataclass(frozen=True)
class CheckpointSource:
    """A verified checkpoint. model: its run's architecture, with the RoPE thetas that were in use."""

    path: Path
    run: RunConfig
    plan: PhasePlan
    tokens: int
    model: FlexBertConfig
    tokenizer: str | None  # fingerprint


def read_source(path: Path) -> CheckpointSource:
    """Raises ConfigError for what is no checkpoint of a run, RunError for a damaged one."""
    if not (path / "manifest.json").is_file():
        kind = what_it_is(path)
        fault = "is no checkpoint (it has no manifest.json)" if kind is None else f"this is {kind}, no checkpoint"
        raise ConfigError(f"{path}: {fault}: give runs/NAME/checkpoints/tokens-N")
    verify_checkpoint(path, (WEIGHTS, _STATE))
    file = path.parent.parent / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{path}: its run's {file} is missing: keep the checkpoint in its run folder")
    run = read_recorded_config(file)
    try:
        state = json.loads((path / _STATE).read_text())["run"]
        step = int(state["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path / _STATE}: no state of a run: {error}") from None
    plan = PhasePlan(run)
    phase = plan.at(max(step - 1, 0))
    thetas = {"global_theta": phase.theta_global, "local_theta": phase.theta_local}
    model = without_init(run.model)
    position = model.position.model_copy(update={key: theta for key, theta in thetas.items() if theta is not None})
    model = model.model_copy(update={"position": position})
    return CheckpointSource(path, run, plan, plan.tokens_before(step), model, state.get("tokenizer"))


def model_of(source: CheckpointSource, weights: Mapping[str, Tensor]) -> FlexBertForMaskedLM:
    """A model of the source's architecture that holds these tensors."""
    with nullcontext() if outside(source.model) else torch.device("meta"):  # parts may keep what they compute when made
        model = build(source.model)
    own = {name: tensor for name, tensor in weights.items() if not name.startswith(PARTS)}
    model.load_state_dict(own, assign=True)
    return model


def write_export(source: CheckpointSource, model: FlexBertForMaskedLM, output: Path, note: str | None) -> None:
    """The model as a folder for transformers, with the source's tokenizer and a card that says what it is."""
    tokenizer = tokenizer_folder(source.run.data)
    if not (tokenizer / "tokenizer.json").is_file():
        raise ConfigError(
            f"its run's tokenizer {tokenizer} is not there: say the command in the folder where it trained"
        )
    origin = read_origin_record(source.path.parent.parent)
    card = report.model_card(source.run, source.plan, source.tokens, None, note, origin)
    flexbert.to_hf(model, tokenizer, output, card=card)
