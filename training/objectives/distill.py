"""A smaller model learns from a teacher: its softmax, and what its layers say (DistilBERT, TinyBERT)."""

import json
from functools import cache
from pathlib import Path
from typing import ClassVar
from weakref import WeakValueDictionary

import torch
import xxhash
from numpy.typing import ArrayLike
from pydantic import Field
from torch import Tensor, nn

import ranks
from data.feed.batches import Batch
from data.feed.loader import tokenizer_folder
from data.keyed import torch_seed
from data.tokenizer import corpus_tokenizer
from flexbert import FlexBertConfig, FlexBertForMaskedLM, from_hf
from flexbert.accounting import batch_flops
from flexbert.distilling import Scored, divergence
from flexbert.hf.convert import read_config
from flexbert.losses import TokenScores
from flexbert_core.durable import write_file
from flexbert_core.schema import Component, ConfigError, Schema, UserPath, named
from recipe.config import RunConfig
from recipe.phases import Phase, PhasePlan
from recipe.slots import OBJECTIVES
from training.objectives.base import Loss

MAPS = "maps"
_KEY = "objective.teacher"


class LayerPair(Schema):
    """Blocks are numbered from 1."""

    student: int = Field(ge=1, description="block of the model, from 1")
    teacher: int = Field(ge=1, description="block of the teacher that it is to be like, from 1")


@OBJECTIVES.register("distill")
class Distillation:
    """The teacher reads the same batch, without gradients. The loss of a batch is

        1/T * (sum over masked tokens of (share * the model's loss + (1 - share) * t^2 KL(teacher || model)) / rate
               + hidden_weight * sum over pairs of layers and all tokens of |W h - h'|^2 / D'),

    T tokens, rate the step's masking rate, t the temperature of both softmaxes (arXiv 1503.02531), h and h' the outputs
    of the pair's blocks, D' the teacher's width and W a trained matrix, or none where the widths are one (TinyBERT,
    arXiv 1909.10351, eq. 9). The matrices start like linear layers of torch's, by the seed.

    Departures: DistilBERT (arXiv 1910.01108) compares directions of h by their cosine; TinyBERT also compares
    attention, which no kernel here gives.
    """

    trains: ClassVar[tuple[str, ...]] = (f"{MAPS}.",)
    loss_parts: ClassVar[tuple[str, ...]] = ("masked", "logits", "hidden")

    class Config(Component):
        teacher: UserPath = Field(
            description="folder of a masked language model that transformers or a run of ours has written "
            "(exports/tokens-N), of the same vocabulary"
        )
        share: float = Field(
            default=0.5, ge=0, le=1, description="of the masked tokens' own loss; the rest is the teacher's softmax"
        )
        temperature: float = Field(default=2.0, gt=0, description="of both softmaxes (DistilBERT: 2)")
        layers: list[LayerPair] = Field(
            default=[], description="blocks whose outputs are compared, such as [{student: 2, teacher: 6}]"
        )
        hidden_weight: float = Field(default=1.0, gt=0, description="of the outputs of blocks")

    @staticmethod
    def check(config: Config, run: RunConfig) -> None:
        """Raises ValueError for layers that the model does not have, and for two teachers."""
        for number, pair in enumerate(config.layers):
            if pair.student > run.model.num_hidden_layers:
                raise ValueError(
                    f"layers[{number}].student: {pair.student}, the model has {run.model.num_hidden_layers} blocks"
                )
        for number, phase in enumerate(run.phases):
            other = phase.objective
            if isinstance(other, Distillation.Config) and (other.teacher, other.layers) != (
                config.teacher,
                config.layers,
            ):
                raise ValueError(f"phases[{number}].objective: has another teacher or layers: a run has one")

    @staticmethod
    def check_files(config: Config, run: RunConfig) -> None:
        """Raises ConfigError for a teacher that cannot be read, or does not go with the model and its tokens."""
        theirs, where = _config_of(config.teacher), f"{_KEY}: {config.teacher}"
        if theirs.vocab_size != run.model.vocab_size:
            raise ConfigError(
                f"{where}: has a vocabulary of {theirs.vocab_size}, the model one of {run.model.vocab_size}: set "
                f"model.vocab_size={theirs.vocab_size}, if the tokenizer is one"
            )
        for number, pair in enumerate(config.layers):
            if pair.teacher > theirs.num_hidden_layers:
                blocks = theirs.num_hidden_layers
                raise ConfigError(
                    f"objective.layers[{number}].teacher: {pair.teacher}, {config.teacher} has {blocks} blocks"
                )
        longest = max(phase.max_seq_len or 0 for phase in run.phases)
        if theirs.max_position_embeddings < longest:
            raise ConfigError(
                f"{where}: reads {theirs.max_position_embeddings} tokens, the rows have {longest}: shorten them"
            )
        if not (Path(config.teacher) / "tokenizer.json").is_file():
            raise ConfigError(
                f"{where}: has no tokenizer.json, which tells whether its tokens are these: save it there"
            )
        ours, given = (_vocabulary(folder) for folder in (tokenizer_folder(run.data), Path(config.teacher)))
        if ours != given:
            token = min(ours.items() ^ given.items())[0]
            raise ConfigError(
                f"{where}: its tokenizer is another one: {token!r} is {given.get(token)} there, {ours.get(token)} in "
                f"{run.data.tokenizer}: prepare the data with the teacher's"
            )

    @staticmethod
    def batch_flops(config: Config, model: FlexBertConfig, lengths: ArrayLike, masked: ArrayLike) -> float:
        """Of the model, of the teacher's forward, and of the matrices between them."""
        theirs = batch_flops(_config_of(config.teacher), lengths, masked) / 3
        tokens = float(torch.as_tensor(lengths, dtype=torch.float64).sum())
        maps = 3 * 2 * tokens * Distillation.parameters_beside(config, model)
        return batch_flops(model, lengths, masked) + theirs + maps

    @staticmethod
    def parameters_beside(config: Config, model: FlexBertConfig) -> int:
        """Of the matrices."""
        return sum(ours * theirs for ours, theirs in _widths(config, model).values())

    @staticmethod
    def frozen_models(config: Config, model: FlexBertConfig) -> list[FlexBertConfig]:
        """Those that are there beside the model, and are not trained."""
        return [_config_of(config.teacher)]

    def __init__(self, config: Config, *, plan: PhasePlan) -> None:
        self.config = config
        self._teacher: FlexBertForMaskedLM | None = None
        self._record, self._digest = Path(), ""

    def build_parts(self, model: FlexBertForMaskedLM, run: RunConfig) -> dict[str, nn.Module]:
        """The matrices, which live in `model.parts`; and the teacher, which does not: not read for a model on meta.

        Raises ConfigError where the folder has other weights than the run learned from so far."""
        if not model.encoder.token_table.is_meta:
            self._record, self._digest = run.folder / "teacher.json", _digest_of(Path(self.config.teacher))
            if self._record.exists() and json.loads(self._record.read_text())["xxh3_64"] != self._digest:
                raise ConfigError(
                    f"{_KEY}: {self.config.teacher}: is another model than the one this run has learned from (see "
                    f"{self._record}): put that one back, or begin a run of another name"
                )
            self._teacher = _teacher(self.config.teacher, self._digest)
        maps: dict[str, nn.Module] = {}
        for number, (ours, theirs) in _widths(self.config, run.model).items():
            generator = torch.Generator("cpu").manual_seed(torch_seed(run.seed, "distillation", number))
            linear = nn.Linear(ours, theirs, bias=False)
            with torch.no_grad():
                values = torch.empty(linear.weight.shape, device="cpu")
                linear.weight.copy_(values.uniform_(-(ours**-0.5), ours**-0.5, generator=generator))
            maps[str(number)] = linear
        return {MAPS: nn.ModuleDict(maps)} if maps else {}

    def begin(self, model: FlexBertForMaskedLM, phase: Phase, first: bool) -> None:
        """Write down which teacher it is."""
        if ranks.rank() == 0 and not self._record.exists():
            write_file(self._record, json.dumps({"teacher": self.config.teacher, "xxh3_64": self._digest}))

    def count(self, batch: Batch) -> int:
        return batch["tokens"]

    def loss(self, model: FlexBertForMaskedLM, batch: Batch) -> Loss:
        tokens, masked, inputs = batch["tokens"], batch["masked"], (batch["input_ids"], batch["cu_seqlens"])
        ours: dict[int, Tensor | None] = {pair.student - 1: None for pair in self.config.layers}
        theirs: dict[int, Tensor | None] = {pair.teacher - 1: None for pair in self.config.layers}
        rest = (batch["max_seqlen"], batch["labels"])
        teacher = self._on(batch["input_ids"].device)
        with torch.no_grad():
            their_states, _, _ = teacher.masked_states(*inputs, *rest, num_masked=masked, kept=theirs)
        states, _, targets = model.masked_states(*inputs, *rest, num_masked=masked, kept=ours)
        weight, bias = model.head.decoder(model.encoder.token_table)
        scores = TokenScores.empty(targets)
        restored = model.loss(states, weight, bias, targets, scores)
        their_weight, their_bias = teacher.head.decoder(teacher.encoder.token_table)
        told = Scored(states, weight, bias), Scored(their_states, their_weight, their_bias)
        differing = divergence(*told, self.config.temperature)
        hidden = torch.zeros_like(differing)
        maps = dict(model.get_submodule(f"parts.{MAPS}").named_children()) if _has_maps(model) else {}
        for number, pair in enumerate(self.config.layers):
            mine, wanted = ours[pair.student - 1], theirs[pair.teacher - 1]
            assert mine is not None
            assert wanted is not None
            if (key := str(number)) in maps:
                mine = maps[key](mine)
            hidden = hidden + (mine[:tokens].float() - wanted[:tokens].float()).square().mean(1).sum()
        share = self.config.share
        of_masked = (share * restored + (1 - share) * differing) / batch["masking_rate"]
        parts = {"masked": (restored.detach(), masked), "logits": (differing.detach(), masked)}
        if self.config.layers:
            parts["hidden"] = (hidden.detach(), tokens)
        return Loss(of_masked + self.config.hidden_weight * hidden, tokens, scores, parts)

    def _on(self, device: torch.device) -> FlexBertForMaskedLM:
        """The teacher, on the model's device: that is known when a batch is there."""
        assert self._teacher is not None
        if self._teacher.encoder.token_table.device != device:
            self._teacher = self._teacher.to(device)
        return self._teacher


_TEACHERS = WeakValueDictionary[tuple[str, str], FlexBertForMaskedLM]()


def _teacher(folder: str, digest: str) -> FlexBertForMaskedLM:
    """In evaluation mode, and without gradients; one for all objectives that learn from it. Raises ConfigError."""
    if (found := _TEACHERS.get((folder, digest))) is None:
        with named(_KEY):
            found = from_hf(folder).eval().requires_grad_(False)
        _TEACHERS[folder, digest] = found
    return found


def _has_maps(model: FlexBertForMaskedLM) -> bool:
    return hasattr(model, "parts") and MAPS in model.get_submodule("parts")  # pyright: ignore[reportOperatorIssue]


def _widths(config: Distillation.Config, model: FlexBertConfig) -> dict[int, tuple[int, int]]:
    """Of the model and the teacher, by the number of the pair; nothing where they are one."""
    ours = model.hidden_size
    theirs = _config_of(config.teacher).hidden_size if config.layers else ours
    return {} if ours == theirs else {number: (ours, theirs) for number in range(len(config.layers))}


@cache
def _config_of(teacher: str) -> FlexBertConfig:
    """Read once: each step's FLOPs ask. Raises ConfigError."""
    with named(_KEY):
        return read_config(Path(teacher))


def _vocabulary(folder: Path) -> dict[str, int]:
    return corpus_tokenizer(folder).get_vocab(with_added_tokens=True)


def _digest_of(folder: Path) -> str:
    """Of a model's config and weights."""
    digest = xxhash.xxh3_64()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(file.read_bytes())
    return digest.hexdigest()
