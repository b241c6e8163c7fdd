"""Replaced tokens are detected (ELECTRA, arXiv 2003.10555)."""

from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from pydantic import Field
from torch import Tensor, nn

from data.feed.batches import Batch
from data.feed.masking import IGNORE
from data.keyed import torch_seed
from flexbert import FlexBertConfig, FlexBertForMaskedLM, build
from flexbert.accounting import batch_flops, count_parameters
from flexbert.config import load_preset, without_init
from flexbert.dropout import current_keys
from flexbert.init import parameter_seed
from flexbert.losses import TokenScores, sample_tokens
from flexbert.tasks import FlexBertForTokenClassification
from flexbert_core.composing import merge
from flexbert_core.schema import Component, ConfigError
from recipe.config import RunConfig
from recipe.phases import Phase, PhasePlan
from recipe.slots import OBJECTIVES
from training.objectives.base import Loss

GENERATOR, DETECTOR = "generator", "detector"
SITE = parameter_seed(0, "replaced tokens")


@OBJECTIVES.register("rtd")
class ReplacedTokens:
    """A generator restores masked tokens; what it would put there stands in the text that the model reads, which tells
    of every token whether it is the one that was there (section 2). The loss of a batch is

        1/T * (sum over masked tokens of the generator's loss / rate + weight * sum over all tokens of the detection's),

    T tokens, rate the step's masking rate; nothing of the detection reaches the generator. Replacements are drawn from
    the generator's softmax, keyed by the seed, the step and the token's row and place; one that is the token itself
    counts as original.

    embeddings `disentangled` (DeBERTaV3, arXiv 2111.09543, section 3.2): the model's token table is the generator's, of
    which no gradient comes back, plus a part of its own. The sum is what is kept: after each step it moves by as much
    as the generator's table did. `tied`: one table for both (ELECTRA). Both want the generator as wide as the model.

    Departures: the paper divides the generator's sum by the number of masked tokens, which a microbatch does not know;
    rate * T is its mean, but for [CLS] and [SEP]. Its detector has a dense layer before the last one, here the last one
    reads the encoder's output. Of disentangled tables DeBERTaV3 decays the model's own part; here weight decay acts on
    the sum.
    """

    idle: ClassVar[tuple[str, ...]] = ("head.",)
    trains: ClassVar[tuple[str, ...]] = (f"{GENERATOR}.", f"{DETECTOR}.")
    loss_parts: ClassVar[tuple[str, ...]] = ("generator", "detection")
    export_kinds: ClassVar[tuple[str, ...]] = ("generators", "detectors")

    class Config(Component):
        generator: dict[str, Any] = Field(
            default={"num_hidden_layers": 2},
            description="the model that fills in replacements: what differs from `model`, or {preset: NAME, ...}; "
            "ELECTRA: a quarter to half of the width, DeBERTaV3: half of the layers",
        )
        weight: float = Field(default=50.0, gt=0, description="of the detection's loss (ELECTRA: 50)")
        embeddings: Literal["disentangled", "tied", "separate"] = Field(
            default="disentangled", description="how the token tables of both hang together"
        )

    @staticmethod
    def check(config: Config, run: RunConfig) -> None:
        """Raises ValueError for what a generator cannot go with."""
        generator = generator_of(config, run.model)
        if run.trainer.parallelism.name != "ddp":
            raise ValueError(f"trainer.parallelism: {run.trainer.parallelism.name} cannot hold a generator: use ddp")
        if generator.vocab_size != run.model.vocab_size:
            raise ValueError(
                f"generator.vocab_size: {generator.vocab_size}, the model has {run.model.vocab_size}: leave it out"
            )
        if config.embeddings != "separate" and generator.hidden_size != run.model.hidden_size:
            raise ValueError(
                f"embeddings: {config.embeddings} wants the generator as wide as the model, {run.model.hidden_size}, "
                f"and not {generator.hidden_size}: use separate, or a generator of fewer layers"
            )
        longest = max(phase.max_seq_len or 0 for phase in run.phases)
        if generator.max_position_embeddings < longest:
            raise ValueError(f"generator.max_position_embeddings: under the rows' {longest} tokens: raise it")
        for number, phase in enumerate(run.phases):
            other = phase.objective
            same = ("generator", "embeddings")
            if isinstance(other, ReplacedTokens.Config) and any(
                getattr(other, key) != getattr(config, key) for key in same
            ):
                raise ValueError(f"phases[{number}].objective: has another generator or embeddings: a run has one")

    @staticmethod
    def batch_flops(config: Config, model: FlexBertConfig, lengths: ArrayLike, masked: ArrayLike) -> float:
        """Of the generator on masked tokens, and of the model on all, which has no decoder."""
        detection = batch_flops(model, lengths, lengths, head=False)
        return batch_flops(generator_of(config, model), lengths, masked) + detection

    @staticmethod
    def models(config: Config, model: FlexBertConfig) -> list[FlexBertConfig]:
        """Those that are trained beside the model."""
        return [generator_of(config, model)]

    @staticmethod
    def parameters_beside(config: Config, model: FlexBertConfig) -> int:
        """Of generator and detector; a tied table is the model's."""
        tied = model.vocab_size * model.hidden_size if config.embeddings == "tied" else 0
        return count_parameters(generator_of(config, model)) - tied + _of_detector(model)

    @staticmethod
    def parameters_exported(config: Config, model: FlexBertConfig) -> int:
        """What `exports` writes."""
        detector = count_parameters(plain(model), head=False) + _of_detector(model)
        return count_parameters(generator_of(config, model)) + detector

    @staticmethod
    def exports(model: FlexBertForMaskedLM) -> dict[str, FlexBertForMaskedLM | FlexBertForTokenClassification]:
        """What is exported beside the model, by the folder's name: the generator, and the model as a detector, with one
        score a token, over 0 where it says replaced."""
        generator, head = parts_of(model)
        detector = build(detector_config(without_init(model.config)), "tokens")
        detector.encoder.load_state_dict(model.encoder.state_dict())
        detector.head.load_state_dict(head.state_dict())
        return dict(zip(ReplacedTokens.export_kinds, (generator, detector), strict=True))

    def __init__(self, config: Config, *, plan: PhasePlan) -> None:
        self.config = config
        self._before: Tensor | None = None  # the generator's table before the step

    def build_parts(self, model: FlexBertForMaskedLM, run: RunConfig) -> dict[str, nn.Module]:
        """The generator and the detector, which live in `model.parts`."""
        generator = build(generator_of(self.config, run.model), seed=torch_seed(run.seed, "generator"))
        if self.config.embeddings == "tied":
            generator.encoder.embedding.tokens.weight = model.encoder.embedding.tokens.weight
        generator.encoder.recompute_every = model.encoder.recompute_every
        # Only its head is kept; of one layer alone all would be global, which is warned of.
        small = detector_config(run.model).model_copy(update={"num_hidden_layers": 2, "initial_layers": None})
        head = build(small, "tokens", seed=torch_seed(run.seed, "detector")).head
        return {GENERATOR: generator, DETECTOR: head}

    def count(self, batch: Batch) -> int:
        return batch["tokens"]

    def loss(self, model: FlexBertForMaskedLM, batch: Batch) -> Loss:
        tokens, found = batch["tokens"], replace(model, batch)
        detected = found.detection_loss()
        parts = {"generator": (found.restored.detach(), batch["masked"]), "detection": (detected.detach(), tokens)}
        total = found.restored / batch["masking_rate"] + self.config.weight * detected
        return Loss(total, tokens, found.scores, parts)

    @torch.no_grad()
    def begin(self, model: FlexBertForMaskedLM, phase: Phase, first: bool) -> None:
        """Before a step that is the phase's first in this process. first: or in the run, behind another objective: the
        generator then starts from the model's token table."""
        self.set_theta(model, phase)
        if first and self.config.embeddings == "disentangled":
            parts_of(model)[0].encoder.token_table.copy_(model.encoder.token_table)

    def set_theta(self, model: FlexBertForMaskedLM, phase: Phase) -> None:
        """Of the generator, as the phase has it."""
        generator, _ = parts_of(model)
        if hasattr(generator.config.position, "global_theta"):
            generator.set_rope_theta(phase.theta_global, phase.theta_local)

    @torch.no_grad()
    def before_step(self, model: FlexBertForMaskedLM) -> None:
        if self.config.embeddings == "disentangled":
            self._before = parts_of(model)[0].encoder.token_table.clone()

    @torch.no_grad()
    def after_step(self, model: FlexBertForMaskedLM) -> None:
        if self._before is not None:
            model.encoder.token_table.add_(parts_of(model)[0].encoder.token_table - self._before)
            self._before = None


class Replaced(NamedTuple):
    """A batch with the generator's tokens in it, as the model sees it.   M masked tokens, T tokens of the batch."""

    restored: Tensor  # the generator's loss, a sum over masked tokens
    scores: TokenScores  # the generator's, (M,)
    logits: Tensor  # (T,) float32, over 0: replaced
    is_replaced: Tensor  # (T,) bool

    def detection_loss(self) -> Tensor:
        """A sum over tokens, in nats."""
        return F.binary_cross_entropy_with_logits(self.logits, self.is_replaced.to(self.logits.dtype), reduction="sum")


def replace(model: FlexBertForMaskedLM, batch: Batch) -> Replaced:
    """What generator and model make of a batch. Within `keyed_dropout`, whose keys the draws are by."""
    tokens, count = batch["tokens"], batch["masked"]
    generator, detector = parts_of(model)
    bounds, longest, labels = batch["cu_seqlens"], batch["max_seqlen"], batch["labels"]
    states, index, targets = generator.masked_states(batch["input_ids"], bounds, longest, labels, num_masked=count)
    weight, bias = generator.head.decoder(generator.encoder.token_table)
    scores = TokenScores.empty(targets)
    restored = generator.loss(states, weight, bias, targets, scores)
    keys = current_keys()
    assert keys is not None
    chance = keys.uniform(SITE).index_select(0, index)
    found = sample_tokens(states.detach(), weight.detach(), None if bias is None else bias.detach(), chance)
    original = torch.where(labels == IGNORE, batch["input_ids"], labels)
    shown = original.index_copy(0, index, found)
    hidden = model.encoder(shown, bounds, longest)[:tokens]
    logits = detector(hidden, bounds).squeeze(1).float()
    return Replaced(restored, scores, logits, (shown != original)[:tokens])


def parts_of(model: FlexBertForMaskedLM) -> tuple[FlexBertForMaskedLM, nn.Module]:
    """Generator and detector."""
    parts = cast(nn.ModuleDict, model.get_submodule("parts"))
    return cast(FlexBertForMaskedLM, parts[GENERATOR]), parts[DETECTOR]


def generator_of(config: ReplacedTokens.Config, model: FlexBertConfig) -> FlexBertConfig:
    """Raises ValueError, one line, for what makes no model."""
    given = dict(config.generator)
    try:
        below = load_preset(given.pop("preset")) if "preset" in given else plain(model).to_dict()
        return FlexBertConfig.from_dict(merge(below, given))
    except ConfigError as error:
        lines = [line.removeprefix("model: ") for line in str(error).splitlines()]
        raise ValueError(f"generator: {'; '.join(lines)}") from None


def detector_config(model: FlexBertConfig) -> FlexBertConfig:
    """Of the encoder with one score for each token."""
    head = {"name": "tokens", "num_labels": 1, "dropout": 0.0}
    return FlexBertConfig.from_dict({**plain(model).to_dict(), "head": head})


def _of_detector(model: FlexBertConfig) -> int:
    """Parameters of its head, one score and its bias."""
    return model.hidden_size + 1


def plain(model: FlexBertConfig) -> FlexBertConfig:
    """With starting weights that are drawn: what `model` grows from has no generator."""
    return without_init(model) if model.init.name == "grow" else model
