"""Branches: runs that start from another run's checkpoint, or from a Hugging Face folder (the run file's `from`).

A branch counts its own steps and tokens from 0; its phases are what follows. By default weights, optimizer and the
data's place go on, so a branch whose phases repeat the rest of its origin's gives the same weights to the last bit.
It saves what it starts with as its own first checkpoint: from then on it does not need its origin.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

import ranks
from callbacks.ema import WeightAverage
from data.feed.loader import ORDER, Loader
from data.keyed import torch_seed
from flexbert import FlexBertConfig, FlexBertForMaskedLM, build, from_hf
from flexbert.config import without_init
from flexbert_core.composing import leaves
from flexbert_core.misspelt import nearest
from flexbert_core.schema import Component, ConfigError, RunError
from recipe.config import RunConfig, read_recorded_config
from recipe.phases import PhasePlan
from recipe.source_model import source_folder
from recipe.tokens import TokensConfig
from training.checkpoints.files import Checkpoint, load_checkpoint, newest_checkpoint, restore
from training.checkpoints.sharded import load_weights, unshared
from training.ema import restore_average
from training.objectives.phases import PARTS, has_parts
from training.optim.groups import GROUPING
from training.token_rows import plan_rows, tell, with_rows

log = logging.getLogger(__name__)
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_HARMLESS = ("init.", "loss.", "max_position_embeddings", "position.global_theta", "position.local_theta")


@dataclass(frozen=True)
class Start:
    """What a branch begins with, verified and known to fit its config.

    checkpoint: None for weights only. record: for origin.json: the folder, its hash, the run's name, steps (of the
    optimizer, over all ancestors) and tokens (slots, over all ancestors), and whether the data go on.
    """

    record: dict[str, Any]
    weights: dict[str, Tensor]
    checkpoint: Checkpoint | None
    parent: RunConfig | None
    tokenizer: str | None  # fingerprint, of a checkpoint
    rows: int | None  # of the token table; None: of another tokenizer's

    def check_data(self, config: RunConfig, fingerprints: Mapping[str, str], tokenizer: str) -> None:
        """Raise ConfigError when ids mean other tokens here, or when the data cannot go on where they stood.

        fingerprints: of the streams' shards, by name. tokenizer: fingerprint of what made them.
        """
        where = self.record["from"]
        if self.tokenizer not in (None, tokenizer):
            raise ConfigError(
                f"data.tokenizer: {config.data.tokenizer}: is not the tokenizer that {where} was trained with: "
                "prepare the streams with that one"
            )
        if self.record["data"] == "restart":
            return
        assert self.checkpoint is not None
        assert self.parent is not None
        theirs, ours = dict[str, Any](self.checkpoint.state["data"]), dict[str, Any](fingerprints)
        lanes = len(self.checkpoint.state["loader"]["lanes"])
        faults = [("seed", config.seed, self.parent.seed), ("data.lanes", config.lanes, lanes)]
        faults += [(f"data.{key}", getattr(config.data, key), getattr(self.parent.data, key)) for key in ORDER]
        faults += [("data.streams", list(ours), list(theirs))]
        faults += [
            (f"data.streams.{name}", f"shards {shards}", f"shards {theirs.get(name)}") for name, shards in ours.items()
        ]
        for key, here, there in faults:
            if here != there:
                raise ConfigError(
                    f"{key}: {here} here, {there} where {where} was trained: make them equal, or "
                    "say `from: {checkpoint: ..., data: restart}`"
                )

    def apply(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loader: Loader, ema: WeightAverage | None
    ) -> None:
        """Put it into everything, in place; the optimizer and the moving average keep their own config's
        hyperparameters."""
        if self.checkpoint is None:
            beside = {name: part for name, part in unshared(model).items() if name.startswith(PARTS)}
            load_weights(model, {**self.weights, **beside})
            return
        goes_on = ema is not None and restore_average(self.checkpoint, model, ema)
        if goes_on != (ema is not None or bool(self.checkpoint.ema)) and ranks.rank() == 0:
            what = "has no moving average of the weights: this one's begins anew"
            if ema is None:
                what = "has a moving average of the weights, which is left out: this run has no `ema`"
            log.warning("from: %s: %s", self.record["from"], what)
        # `setup` is optimi's mark that its step counter, which is in the group too, has begun.
        given = [
            {key: group[key] for key in (*optimizer.defaults, "lr_factor") if key in group and key != "setup"}
            for group in optimizer.param_groups
        ]
        restore(self.checkpoint, model, optimizer)
        for group, values in zip(optimizer.param_groups, given, strict=True):
            group.update(values)
        if self.record["data"] == "continue":
            loader.load_state_dict({"step": 0, "lanes": self.checkpoint.state["loader"]["lanes"]})


def read_origin(config: RunConfig) -> Start | None:
    """What `from` names, None without it. Raises ConfigError, starting with the key, when it is missing, damaged or of
    another architecture or optimizer."""
    if config.origin is None:
        return None
    try:
        folder = source_folder(config.origin.checkpoint)
    except ConfigError as error:
        raise ConfigError(f"from: {error}") from None
    if folder.resolve().is_relative_to(config.folder.resolve()):
        raise ConfigError(f"from: {folder}: is this run's own folder: give the branch a name of its own")
    return _read_hf(config, folder) if (folder / "config.json").is_file() else _read_run(config, folder)


def _read_hf(config: RunConfig, folder: Path) -> Start:
    assert config.origin is not None
    if config.origin.weights_only is False or config.origin.data == "continue":
        wrong = "weights_only: false" if config.origin.weights_only is False else "data: continue"
        raise ConfigError(f"from: {folder}: {wrong} cannot hold: a Hugging Face folder has weights only: leave it out")
    where, rows = config.origin.checkpoint, config.model.vocab_size
    their_config, old = _weights_of(config, folder)
    their_rows = len(old["encoder.embedding.tokens.weight"])
    plan = plan_rows(config, folder, their_rows)
    weights = with_rows(old, plan, config.tokens.init, config.seed)
    theirs = their_config.model_copy(update={"vocab_size": rows})
    if config.origin.fresh_head:
        weights |= _fresh_head(config)
    _check_model(theirs, theirs, weights, config, where)
    record = {
        "from": where,
        "xxh3_64": _hash([folder / "config.json", *sorted(folder.glob("*.safetensors"))]),
        "run": None,
        "steps": 0,
        "tokens": 0,
        "data": "restart",
        "vocabulary": tell(plan, config.tokens.init),
    }
    return Start(record, weights, None, None, None, None if config.tokens.other_tokenizer else their_rows)


def _weights_of(config: RunConfig, folder: Path) -> tuple[FlexBertConfig, dict[str, Tensor]]:
    """Config and weights, under our names, of a Hugging Face folder; without a head where a fresh one is wanted."""
    assert config.origin is not None
    try:
        if config.origin.fresh_head:
            encoder = from_hf(folder, "encoder")
            return encoder.config, {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
        model = from_hf(folder)
        return model.config, dict(model.state_dict())
    except ConfigError as error:
        # The library's hint is for who calls it
        said = str(error).replace(
            "loads with task='encoder'", "goes on with `from: {checkpoint: ..., fresh_head: true}`"
        )
        raise ConfigError(f"from: {said}") from None


def _fresh_head(config: RunConfig) -> dict[str, Tensor]:
    """The weights of the head as a new model of this config and seed has them."""
    model = without_init(config.model) if config.model.init.name == "grow" else config.model
    fresh = build(model, seed=torch_seed(config.seed, "init"))
    return {name: tensor for name, tensor in unshared(fresh).items() if name.startswith("head.")}


def _read_run(config: RunConfig, folder: Path) -> Start:
    assert config.origin is not None
    try:
        checkpoint = _find_checkpoint(folder)
    except RunError as error:
        raise ConfigError(f"from: {error}") from None
    path, state = checkpoint.path, checkpoint.state
    if config.tokens != TokensConfig() or config.origin.fresh_head:
        key = "from.fresh_head" if config.origin.fresh_head else "tokens"
        raise ConfigError(f"{key}: {path} is a checkpoint, which goes on as it is: name an export of it in `from`")
    file = path.parent.parent / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"from: {path}: its run's {file} is missing: keep the checkpoint in its run folder")
    parent = read_recorded_config(file)
    plan = PhasePlan(parent)
    step = int(state["step"])
    phase = plan.at(max(step - 1, 0))
    theta = {"global_theta": phase.theta_global, "local_theta": phase.theta_local}
    theirs = parent.model.position.model_copy(update={key: value for key, value in theta.items() if value})
    trained = parent.model.model_copy(update={"position": theirs})
    own = {name: tensor for name, tensor in checkpoint.model.items() if not name.startswith(PARTS)}
    _check_model(parent.model, trained, own, config, str(path))
    weights_only, data = config.origin.meaning
    if not weights_only and (len(own) < len(checkpoint.model) or has_parts(config)):
        raise ConfigError(
            f"from: {path}: an objective here or there trains a model beside this one, so weights alone can be taken: "
            "say `from: {checkpoint: ..., weights_only: true}`"
        )
    if not weights_only and config.optimizer.name != parent.optimizer.name:
        raise ConfigError(
            f"optimizer: {config.optimizer.name!r} here, {parent.optimizer.name!r} in the state of {path}: give "
            "that, or say `from: {checkpoint: ..., weights_only: true}`"
        )
    if not weights_only:
        _check_grouping(config.optimizer, parent.optimizer, path)
    if weights_only and checkpoint.ema and config.ema is not None and ranks.rank() == 0:
        log.warning("from: %s: with weights_only the moving average of the weights begins anew", path)
    before = state.get("origin") or {"steps": 0, "tokens": 0}
    record = {
        "from": str(path),
        "xxh3_64": _hash([path / "manifest.json"]),
        "run": parent.name,
        "steps": 0 if weights_only else before["steps"] + step,
        "tokens": before["tokens"] + plan.tokens_before(step),
        "data": data,
    }
    rows = len(own["encoder.embedding.tokens.weight"])
    return Start(record, own, None if weights_only else checkpoint, parent, state.get("tokenizer"), rows)


def _find_checkpoint(folder: Path) -> Checkpoint:
    """Of a checkpoint's or a run's folder. Raises ConfigError when it is neither, RunError when damaged."""
    if (folder / "manifest.json").is_file():
        return load_checkpoint(folder)
    if (folder / "checkpoints").is_dir():
        newest = newest_checkpoint(folder / "checkpoints")
        if newest is None:
            raise ConfigError(f"from: {folder}: has no checkpoint yet: let it train up to one")
        return newest
    beside = {path.name for path in folder.parent.iterdir() if path.is_dir()} if folder.parent.is_dir() else set()
    near = nearest(folder.name, beside)
    hint = "give runs/NAME/checkpoints/tokens-N, a folder, or hf:ORG/NAME"
    if near is not None:
        hint = f"did you mean '{folder.parent / near}'?"
    elif beside:
        hint = f"in {folder.parent} there are: {', '.join(sorted(beside))}"
    raise ConfigError(f"from: {folder}: neither a checkpoint, a run nor a Hugging Face folder: {hint}")


def _check_model(
    theirs: FlexBertConfig, trained: FlexBertConfig, weights: Mapping[str, Tensor], config: RunConfig, where: str
) -> None:
    """Raise ConfigError where weights of config `theirs` are not of this run's model; say what else differs.

    trained: theirs with the RoPE thetas that were last in use.
    """
    ours = config.model
    here, there = leaves(ours.to_dict()), leaves(theirs.to_dict())
    differing = [key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]
    for key in differing:
        if key in _SIZES or (key.endswith(".name") and not key.startswith(_HARMLESS)):
            raise ConfigError(
                f"model.{key}: {here.get(key)} here, {there.get(key)} in {where}: a branch keeps the architecture"
            )
    with torch.device("meta"):
        names = {name: tuple(weight.shape) for name, weight in FlexBertForMaskedLM(ours).named_parameters()}
    for name in sorted(names.keys() ^ weights.keys()):
        raise ConfigError(f"from: {where}: {name} is {'missing there' if name in names else 'not in this model'}")
    for name, shape in names.items():
        if tuple(weights[name].shape) != shape:
            raise ConfigError(f"from: {where}: {name} is {tuple(weights[name].shape)} there, {shape} here")
    for key in differing:
        if not key.startswith(_HARMLESS) and not key.endswith(("dropout", "_token_id", "backend")):
            log.warning("model.%s: %s here, %s in %s", key, here.get(key), there.get(key), where)
    for layers in ("global", "local"):
        was, now = (getattr(model.position, f"{layers}_theta", None) for model in (trained, ours))
        if getattr(config.phases[0].rope_theta, f"{layers}_layers") is None and was != now:
            raise ConfigError(
                f"phases[0].rope_theta.{layers}_layers: {where} was trained at {was:g}, this model has {now:g}: say "
                "which"
            )


def _hash(files: list[Path]) -> str:
    digest = xxhash.xxh3_64()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _check_grouping(here: Component, there: Component, path: Path) -> None:
    """States are kept by groups of parameters, which must be the same. How much a group decays may differ."""
    for key in GROUPING:
        ours, theirs = (_grouping(getattr(each, key, None)) for each in (here, there))
        if ours != theirs:
            raise ConfigError(
                f"optimizer.{key}: other than in the state of {path}, which groups parameters by it: make them equal, "
                "or say `from: {checkpoint: ..., weights_only: true}`"
            )


def _grouping(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [group.model_copy(update={"weight_decay": group.weight_decay is None}) for group in value]
