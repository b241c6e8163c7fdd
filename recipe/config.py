"""The schema of a run file: the only place for a run's defaults, ranges and help text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from data.feed.lanes import LongDocuments
from data.feed.loader import canonical_lanes
from data.feed.masking import DEFAULT, MASKINGS
from data.feed.mixture import DataConfig, StreamShare, check_one_rule, rule_of
from data.store.transfer import is_url
from flexbert import FlexBertConfig
from flexbert.config import load_preset, named_init
from flexbert_core.composing import load_node, merge
from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import MAY_CHANGE, ConfigError, Count, Schema, UserPath, named, or_text, validate
from recipe import source_model
from recipe.batch_sizes import BatchSizeWarmup
from recipe.imports import import_components
from recipe.inheriting import inherit_masking
from recipe.objectives import check_objectives
from recipe.origin import Origin, named_origin
from recipe.publishing import PublishConfig
from recipe.recorded import as_recorded
from recipe.schedules import SCHEDULES
from recipe.sections import CheckpointConfig, EmaConfig, EvaluationConfig, TrainerConfig
from recipe.slots import ALGORITHMS, CALLBACKS, EVALUATIONS, LOGGERS, OBJECTIVES, OPTIMIZERS
from recipe.tokens import TokensConfig


class RopeTheta(Schema):
    """Base of the rotary angles. Absent: as the phase before; in the first phase as the model has it."""

    global_layers: float | None = Field(default=None, ge=1, le=1e15, description="layers with global attention")
    local_layers: float | None = Field(default=None, ge=1, le=1e15, description="layers with sliding-window attention")


class PhaseConfig(Schema):
    """One phase: a token budget, and what changes with it. What is absent stays as in the phase before, key by key in
    rope_theta and masking; but warmup, schedule, batch_size_warmup and masking.rate_schedule belong to one phase and
    are not inherited."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="for logs and milestones")
    tokens: Count = Field(
        gt=0, description="budget in slots: global_batch_size x max_seq_len a step, rounded up to whole steps"
    )
    # Upper bounds here and in flexbert/config.py are far over anything trained: they catch a slip of the keyboard.
    max_seq_len: int | None = Field(default=None, ge=8, le=2**24, description="slots per row")
    global_batch_size: int | None = Field(default=None, ge=1, le=2**20, description="rows per step over all ranks")
    batch_size_warmup: BatchSizeWarmup | None = Field(
        default=None, description="fewer rows per step at first: {from: 768, tokens: 50B}; not inherited"
    )
    lr: float | None = Field(default=None, gt=0, description="peak learning rate of the phase")
    warmup: Count = Field(
        default=0, description="tokens over which lr rises linearly from 0 at the phase's start; not inherited"
    )
    schedule: Annotated[Any, *SCHEDULES.slot()] = Field(
        default="constant", description="shape of lr over the phase after warmup; not inherited"
    )
    rope_theta: RopeTheta = Field(default=RopeTheta(), description="raised when the context is extended")
    masking: Annotated[Any, *MASKINGS.slot(optional=True, default=DEFAULT)] = Field(
        default=None, description="which tokens the model restores; absent keys stay as in the phase before"
    )
    objective: Annotated[Any, *OBJECTIVES.slot(optional=True)] = Field(
        default=None, description="what the model is trained to do; absent: as in the phase before"
    )
    streams: dict[str, StreamShare] | None = Field(
        default=None, min_length=1, description="the mixture: these of data.streams, and no others"
    )
    long_documents: LongDocuments | None = Field(
        default=None, description="over a row's length: split into pieces, truncate to the first, or drop"
    )

    @model_validator(mode="after")
    def _check_warmup(self) -> "PhaseConfig":
        if self.warmup > self.tokens:
            raise ValueError(f"warmup of {self.warmup} tokens is longer than the phase of {self.tokens}: shorten it")
        if self.batch_size_warmup is not None and self.batch_size_warmup.tokens > self.tokens:
            raise ValueError(
                f"batch_size_warmup of {self.batch_size_warmup.tokens} tokens is longer than the phase of "
                f"{self.tokens}: shorten it"
            )
        self.schedule.check(self.warmup)
        return self


def _local(folder: str) -> str:
    if is_url(folder):
        raise ValueError(f"a run lives in a local folder: give one, and checkpoint.remote={folder}")
    return folder


class RunConfig(Schema):
    """A pretraining run. Once begun it takes other values of the keys that may change on resume, and of no others."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        max_length=200,  # a name on Linux has 255 bytes at most
        description="the run folder is RUNS/NAME; rename that, too, and it is the same run",
        json_schema_extra=MAY_CHANGE,
    )
    imports: list[UserPath] = Field(
        default=[],
        json_schema_extra=MAY_CHANGE,  # where files lie: what they register is compared by its name, in its own place
        description="Python files of yours, run by every process before the rest is checked, that register components; "
        "relative to this file",
    )
    runs: Annotated[UserPath, AfterValidator(_local)] = Field(
        default="runs", description="folder of all runs", json_schema_extra=MAY_CHANGE
    )
    seed: int = Field(default=17, ge=0, description="key of every random draw")
    origin: Annotated[Origin, BeforeValidator(named_origin), or_text(".", "runs/mine")] | None = Field(
        default=None,
        alias="from",
        description="a checkpoint, run, Hugging Face folder or model of the hub (hf:ORG/NAME) to start from: a branch",
    )
    tokens: TokensConfig = Field(
        default=TokensConfig(),
        description="what becomes of tokens that the model of `from`, a Hugging Face folder, does not have",
        json_schema_extra=MAY_CHANGE,  # read at the start only, which origin.json records
    )
    model: FlexBertConfig = Field(
        description="a preset of configs/model, or `preset` with overrides, or all fields; from: as the Hugging Face "
        "folder that `from` names"
    )
    data: DataConfig = Field(description="the streams, their mixture, the tokenizer, and how they are read")
    masking: Annotated[Any, *MASKINGS.slot(default=DEFAULT)] = Field(
        default=DEFAULT,
        description="which tokens the model restores, in phases that do not say otherwise; a rate_schedule is that of "
        "the first phase",
    )
    phases: list[PhaseConfig] = Field(min_length=1, description="what is trained, in this order")
    objective: Annotated[Any, *OBJECTIVES.slot()] = Field(
        default="mlm", description="what the model is trained to do, up to the first phase that says otherwise"
    )
    optimizer: Annotated[Any, *OPTIMIZERS.slot()] = Field(
        default="stableadamw", description="how a gradient becomes a step (ModernBERT: stableadamw)"
    )
    trainer: TrainerConfig = Field(default=TrainerConfig(), description="how steps are computed, guarded and logged")
    checkpoint: CheckpointConfig = Field(
        default=CheckpointConfig(),
        description="when the state is saved, and what of it is kept",
        json_schema_extra=MAY_CHANGE,
    )
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="when and on what the held-out loss is measured"
    )
    evaluations: list[Annotated[Any, *EVALUATIONS.slot()]] = Field(
        default=[],
        description="what else is measured whenever the held-out loss is, in this order",
        json_schema_extra=MAY_CHANGE,
    )
    ema: EmaConfig | None = Field(default=None, description="an average of the weights; absent: none is kept")
    callbacks: list[Annotated[Any, *CALLBACKS.slot()]] = Field(
        default=[], description="what watches the run, in this order", json_schema_extra=MAY_CHANGE
    )
    algorithms: list[Annotated[Any, *ALGORITHMS.slot()]] = Field(
        default=[], description="what changes how the run trains: Composer's algorithms, or yours"
    )
    loggers: list[Annotated[Any, *LOGGERS.slot()]] = Field(
        default=["tensorboard"],
        description="where metrics go besides metrics.jsonl and the console",
        json_schema_extra=MAY_CHANGE,
    )

    publish: PublishConfig | None = Field(
        default=None,
        description="where exports are pushed to while the run trains; absent: nowhere",
        json_schema_extra=MAY_CHANGE,
    )

    @model_validator(mode="before")
    @classmethod
    def _inherit_masking(cls, node: Any) -> Any:
        """So that each phase's masking is whole here, and in config.yaml."""
        if isinstance(node, dict) and "wandb" in node:
            raise ValueError("wandb: is an entry of `loggers`: say loggers: [tensorboard, {name: wandb, project: ...}]")
        return {**node, "phases": inherit_masking(node)} if isinstance(node, dict) and "phases" in node else node

    @property
    def folder(self) -> Path:
        """Where everything the run writes goes."""
        return Path(self.runs) / self.name

    @property
    def exports_permanent(self) -> bool:
        """checkpoint.exports, or its default: whether exports are written between milestones, too."""
        default = "milestones" if self.publish is None else "permanent"
        return (self.checkpoint.exports or default) == "permanent"

    @property
    def lanes(self) -> int:
        """data.lanes, or its default for the batch sizes of the phases, those of warmups among them."""
        warmups = [phase.batch_size_warmup for phase in self.phases if phase.batch_size_warmup is not None]
        sizes = [size for warmup in warmups for size in (warmup.start, warmup.step)]
        sizes += [phase.global_batch_size for phase in self.phases]
        return self.data.lanes or canonical_lanes([size for size in sizes if size is not None] or [1])

    @model_validator(mode="after")
    def _check_phases(self) -> "RunConfig":
        names = [phase.name for phase in self.phases]
        limit = self.model.max_position_embeddings
        for number, phase in enumerate(self.phases):
            if names.index(phase.name) != number:
                raise ValueError(f"phases[{number}].name: {phase.name!r} is taken: give each phase its own name")
            if (phase.max_seq_len or 0) > limit:
                raise ValueError(
                    f"phases[{number}].max_seq_len: {phase.max_seq_len} is over model.max_position_embeddings {limit}: "
                    "raise that, or shorten the rows"
                )
        for key in ("max_seq_len", "global_batch_size", "lr"):
            if getattr(self.phases[0], key) is None:
                raise ValueError(f"phases[0].{key}: is required in the first phase")
        others = ((f"evaluations[{number}]", each) for number, each in enumerate(self.evaluations))
        for place, each in (("evaluation", self.evaluation), *others):
            if (getattr(each, "max_seq_len", None) or 0) > limit:
                raise ValueError(f"{place}.max_seq_len: over model.max_position_embeddings {limit}")
        return self

    @model_validator(mode="after")
    def _check_batches(self) -> "RunConfig":
        lanes, target = self.lanes, 1
        for number, phase in enumerate(self.phases):
            target = phase.global_batch_size or target
            sizes = {"global_batch_size": phase.global_batch_size}
            where, warmup = f"phases[{number}].", phase.batch_size_warmup
            if warmup is not None:
                step = warmup.step or lanes
                if warmup.start >= target:
                    raise ValueError(f"{where}batch_size_warmup.from: {warmup.start} is not under {target} rows")
                for key, size in (("batch_size_warmup.from", warmup.start), ("global_batch_size", target)):
                    if size % step:
                        raise ValueError(f"{where}{key}: {size} is no multiple of batch_size_warmup.step {step}")
                sizes |= {"batch_size_warmup.from": warmup.start, "batch_size_warmup.step": warmup.step}
            for key, size in sizes.items():
                if size is not None and size % lanes:
                    raise ValueError(f"{where}{key}: {size} is no multiple of data.lanes {lanes}")
        return self

    @model_validator(mode="after")
    def _check_tokens(self) -> "RunConfig":
        if self.origin is None and self.tokens != TokensConfig():
            raise ValueError("tokens: says what becomes of the tokens of a model that `from` names: give that, too")
        return self

    @model_validator(mode="after")
    def _check_objectives(self) -> "RunConfig":
        check_objectives(self)
        return self

    @model_validator(mode="after")
    def _check_parallelism(self) -> "RunConfig":
        if self.trainer.parallelism.name == "fsdp2":
            if not getattr(OPTIMIZERS.entries[self.optimizer.name], "works_on_shards", False):
                able = sorted(name for name, entry in OPTIMIZERS.entries.items() if hasattr(entry, "works_on_shards"))
                raise ValueError(
                    f"trainer.parallelism: fsdp2 leaves each rank a part of every tensor, and optimizer "
                    f"{self.optimizer.name!r} needs them whole: use ddp, or one of {', '.join(able)}"
                )
            if self.trainer.microbatch_size == "auto":
                raise ValueError(
                    "trainer.microbatch_size: auto cannot go with parallelism fsdp2, where a rank out of memory leaves "
                    "the others waiting for its parameters: give a number of rows"
                )
        return self

    @model_validator(mode="after")
    def _check_mixtures(self) -> "RunConfig":
        shares, where, budget = dict[str, StreamShare](self.data.streams), "data", 0
        for number, phase in enumerate(self.phases):
            if phase.streams is not None:
                if number:
                    _check_tokens(shares, where, budget)
                shares, where, budget = phase.streams, f"phases[{number}]", 0
                for name in shares:
                    if name not in self.data.streams:
                        hint = did_you_mean(name, self.data.streams)
                        raise ValueError(f"{where}.streams.{name}: no stream of data.streams, {hint}")
                try:
                    check_one_rule(shares)
                except ValueError as error:
                    raise ValueError(f"{where}.{error}") from None
            budget += phase.tokens
        _check_tokens(shares, where, budget)
        return self


def _check_tokens(shares: Mapping[str, StreamShare], where: str, budget: int) -> None:
    """Raises ValueError when a mixture given in tokens does not add up to what its phases train on."""
    if rule_of(shares) == "tokens":
        total = sum(share.tokens or 0 for share in shares.values())
        if abs(total - budget) > 0.01 * budget:
            raise ValueError(
                f"{where}.streams: their tokens add up to {total}, the phases with this mixture train on {budget}: "
                "make them equal, or give weights"
            )


def _as_preset(model: Any) -> Any:
    """`model: NAME` says enough."""
    return {"preset": model} if isinstance(model, str) else model


# The short forms of a run file, for merging.
SPELLED = {"model": _as_preset, "model.init": named_init, "from": named_origin}


def expand_preset(node: dict[str, Any]) -> dict[str, Any]:
    """`model: NAME` or `model: {preset: NAME, ...}` -> the preset's fields with the overrides merged over them."""
    model = _as_preset(node.get("model"))
    if not isinstance(model, dict) or model.get("preset") is None:
        return node
    if model["preset"] == source_model.NAME:  # known once all else is, see check_run
        return {**node, "model": model}
    own = {key: value for key, value in model.items() if key != "preset"}
    return {**node, "model": merge(load_preset(model["preset"]), own, SPELLED, ("model",))}


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, compose and check a run file. Raises ConfigError, one line per fault: `file: key.path: what is wrong`."""
    try:
        node = load_node(path, overrides, expand_preset, SPELLED)
    except ConfigError as error:
        line = str(error)
        raise ConfigError(line if line.startswith(str(path)) else f"{path}: {line}") from None
    return check_run(node, Path(path))


def read_recorded_config(
    file: Path, overrides: Sequence[str] = (), changes: Mapping[str, Any] = MappingProxyType({})
) -> RunConfig:
    """The config that a run recorded in its folder, with `changes` merged over it, and overrides over those. Raises
    ConfigError when it does not load any more."""
    return check_run(load_node(file, overrides, amend=lambda node: merge(as_recorded(node), changes)), file)


def check_run(node: dict[str, Any], path: Path) -> RunConfig:
    """Import what the node says, look up `model: from`, then check it all. Raises ConfigError, one line per fault."""
    node = import_components(node, path)
    with named(path):
        node = source_model.from_source(node)
    return validate(RunConfig, node, path)
