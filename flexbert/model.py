"""Models for a task, and `build`, the way to make one.   T packed tokens, M masked ones, D hidden, V vocabulary."""

import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, nn

from flexbert.config import FlexBertConfig
from flexbert.dropout import name_sites
from flexbert.encoder import FlexBertEncoder
from flexbert.heads import TaskConfig
from flexbert.kernels import linear, require_backend
from flexbert.losses import TokenScores, masked_evaluation
from flexbert.registry import HEADS, INITS, LOSSES
from flexbert.tasks import IGNORE, FlexBertForSequenceClassification, FlexBertForTokenClassification
from flexbert_core.misspelt import did_you_mean
from flexbert_core.schema import ConfigError

log = logging.getLogger(__name__)
R = TypeVar("R")


class MaskedLMOutput(NamedTuple):
    """What a masked language model returns."""

    loss: Tensor | None  # float32 scalar, nats per masked token; None without labels
    logits: Tensor | None  # (T, V); None with labels
    hidden_states: Tensor | None  # (T, D), after the final norm; None with labels: then those of masked tokens suffice
    scores: TokenScores | None = None  # of each masked token, in order; None without labels


class FlexBertForMaskedLM(nn.Module):
    """Encoder with a masked-token head."""

    def __init__(self, config: FlexBertConfig) -> None:
        super().__init__()
        self.encoder = FlexBertEncoder(config)
        self.head = HEADS.build(config.head, model=config)
        if not hasattr(self.head, "decoder"):
            raise ConfigError(f"head: {config.head.name} has no method `decoder`: see docs/extending/head.md")
        self.loss = LOSSES.build(config.loss)

    @property
    def config(self) -> FlexBertConfig:
        """The architecture, with the RoPE thetas now in use."""
        return self.encoder.config

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        num_masked: int | None = None,
    ) -> MaskedLMOutput:
        """Scores of every token, or, with labels, the mean loss over this batch's masked tokens.

        input_ids: (T,) int64. cu_seqlens: (num_seqs + 1,) int32. max_seqlen: tokens of the longest sequence.
        labels: (T,) int64, -100 = not masked. token_type_ids: (T,) int64; None: all 0.
        num_masked: how many labels are not -100; then the host never waits for the device, and is believed but on the
        CPU. None: it is counted.
        The head runs on masked tokens only and their logits never exist all at once; the last block computes only what
        they need (FlexBertEncoder.forward, wanted). Without masked tokens the loss is 0 and every parameter still gets
        a gradient, of zeros: DDP waits for it.
        Raises ValueError for other shapes and dtypes, for num_masked without labels and, on the CPU, for another number
        than theirs.
        """
        if labels is None and num_masked is not None:
            raise ValueError(f"num_masked: {num_masked} without labels, of which it is the number: give labels too")
        if labels is None:
            weight, bias = self.head.decoder(self.encoder.token_table)
            hidden_states = self.encoder(input_ids, cu_seqlens, max_seqlen, token_type_ids)
            return MaskedLMOutput(None, linear(self.head(hidden_states), weight, bias), hidden_states)
        loss, count, scores = self.masked_loss(input_ids, cu_seqlens, max_seqlen, labels, token_type_ids, num_masked)
        return MaskedLMOutput(loss / max(count, 1), None, None, scores)

    def masked_loss(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        labels: Tensor,
        token_type_ids: Tensor | None = None,
        num_masked: int | None = None,
        causal: bool = False,
    ) -> tuple[Tensor, int, TokenScores]:
        """The loss of masked tokens as a sum (float32 scalar, nats), their number, and the scores of each.

        causal: as in FlexBertEncoder.forward. Other arguments, and what is raised, as in `forward`.
        """
        weight, bias = self.head.decoder(self.encoder.token_table)
        states, _, targets = self.masked_states(
            input_ids, cu_seqlens, max_seqlen, labels, token_type_ids, num_masked, causal
        )
        scores = TokenScores.empty(targets)
        return self.loss(states, weight, bias, targets, scores), len(targets), scores

    def masked_states(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        labels: Tensor,
        token_type_ids: Tensor | None = None,
        num_masked: int | None = None,
        causal: bool = False,
        kept: dict[int, Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the masked tokens what the decoder reads, (M, D), their places, (M,) int64 and rising, and labels, (M,).

        kept: as in FlexBertEncoder.forward. Other arguments, and what is raised, as in `masked_loss`.
        """
        index, targets = _masked(input_ids, labels, num_masked)
        hidden_states = self.encoder(input_ids, cu_seqlens, max_seqlen, token_type_ids, index, causal, kept)
        return self.head(hidden_states), index, targets

    def within(self, function: Callable[["FlexBertForMaskedLM"], R]) -> R:
        """What the function makes of this model. Where ranks hold parts of the parameters (FSDP2), they are whole in
        here, so code that calls parts of the model, and not its forward, belongs here."""
        return function(self)

    @torch.no_grad()
    def evaluate(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        labels: Tensor,
        causal: bool = False,
        scores: TokenScores | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss sum in nats float64, masked tokens predicted right int64, masked tokens int64), scalars.

        Arguments as in `masked_loss`; scores: filled if given, of each masked token in order. Without gradients;
        whether dropout acts is the caller's `eval()`.
        """
        weight, bias = self.head.decoder(self.encoder.token_table)
        index, targets = _masked(input_ids, labels)
        hidden_states = self.encoder(input_ids, cu_seqlens, max_seqlen, wanted=index, causal=causal)
        loss, correct = masked_evaluation(self.head(hidden_states), weight, bias, targets, scores)
        return loss, correct, torch.tensor(len(targets), device=loss.device)

    def encode(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Hidden states (batch, seq, D) of a padded batch (batch, seq), zero where attention_mask is false."""
        return self.encoder.encode(input_ids, attention_mask, token_type_ids)

    def compile_blocks(self) -> None:
        """Compile each block (FlexBertEncoder.compile_blocks) and, on CUDA, what is between products of the loss."""
        self.encoder.compile_blocks()
        if self.encoder.token_table.is_cuda and hasattr(self.loss, "compiled"):
            self.loss.compiled = True

    def set_rope_theta(self, global_theta: float | None = None, local_theta: float | None = None) -> None:
        """See FlexBertEncoder.set_rope_theta."""
        self.encoder.set_rope_theta(global_theta, local_theta)


def _masked(input_ids: Tensor, labels: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Places (M,) and labels (M,) of the masked tokens. count: M, where the caller knows it."""
    if labels.shape != input_ids.shape or labels.dtype != torch.int64:
        raise ValueError(f"expected labels {tuple(input_ids.shape)} int64, got {tuple(labels.shape)} {labels.dtype}")
    real = labels != IGNORE
    # As in check_packed, a look at values on the CPU only, where it makes nobody wait
    if count is not None and labels.device.type == "cpu":
        actual = int((labels.numpy() != IGNORE).sum())
        if actual != count:
            raise ValueError(f"num_masked: {count}, but {actual} labels are not {IGNORE}: give that, or leave it out")
    # Sorting puts the masked tokens first, in order, and does not ask the device how many there are.
    index = real.nonzero().squeeze(1) if count is None else real.argsort(descending=True, stable=True)[:count]
    return index, labels.index_select(0, index)


Model = FlexBertForMaskedLM | FlexBertForSequenceClassification | FlexBertForTokenClassification | FlexBertEncoder

_TASKS: dict[str, Any] = {
    "mlm": FlexBertForMaskedLM,
    "classification": FlexBertForSequenceClassification,
    "tokens": FlexBertForTokenClassification,
    "encoder": FlexBertEncoder,
}


@overload
def build(
    config: FlexBertConfig, task: Literal["mlm"] = "mlm", *, seed: int = 0, grow_from: FlexBertForMaskedLM | None = None
) -> FlexBertForMaskedLM: ...
@overload
def build(
    config: FlexBertConfig, task: Literal["encoder"], *, seed: int = 0, grow_from: FlexBertForMaskedLM | None = None
) -> FlexBertEncoder: ...
@overload
def build(
    config: FlexBertConfig,
    task: Literal["classification"],
    *,
    num_labels: int | None = None,
    seed: int = 0,
    grow_from: FlexBertForMaskedLM | None = None,
) -> FlexBertForSequenceClassification: ...
@overload
def build(
    config: FlexBertConfig,
    task: Literal["tokens"],
    *,
    num_labels: int | None = None,
    seed: int = 0,
    grow_from: FlexBertForMaskedLM | None = None,
) -> FlexBertForTokenClassification: ...
def build(
    config: FlexBertConfig,
    task: str = "mlm",
    *,
    num_labels: int | None = None,
    seed: int = 0,
    grow_from: FlexBertForMaskedLM | None = None,
) -> Model:
    """A model with fresh weights, in training mode, on torch's default device and of its default dtype (float32).

    task: "mlm", "classification" (of sequences), "tokens" (classification of each) or "encoder" (no head). The config's
    head serves if it is one for the task; else the task's own replaces it, with its defaults, so that a pretraining
    config serves for fine-tuning, but for what a head of another classification says and it has too. num_labels: of a
    classification; None: as the head says.
    seed: each parameter's start is a function of it and of the parameter's name; torch's global generator is neither
    read nor moved. Under `torch.device("meta")` nothing is allocated or drawn.
    grow_from: the smaller model whose weights init `grow` tiles; other inits take none.
    Raises ConfigError for a task that does not exist, for num_labels of a task without labels, for a head that cannot
    do masked-token training, for an attention backend that cannot run here, and for a model to grow from that is
    missing, not asked for or does not fit. Warns of fields that no layer reads.
    """
    if task not in _TASKS:
        raise ConfigError(f"task: {task!r} cannot be built, {did_you_mean(task, _TASKS)}")
    if torch.empty(0).device.type != "meta":  # torch.get_default_device overlooks `with torch.device`
        _require_kernel(config)
    config = _with_head(config, task, num_labels)
    # Modules draw their own starting weights when constructed; those not overwritten by `init` depend on the seed too.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _TASKS[task](config)
    name_sites(model)
    for line in config.unread():
        log.warning("model.%s", line)
    init = INITS.build(config.init, num_hidden_layers=config.num_hidden_layers)
    prefix = "encoder" if task == "encoder" else ""
    if getattr(init, "grows", False):
        init(model, seed, prefix, grow_from)
    elif grow_from is not None:
        raise ConfigError(f"grow_from: init {config.init.name!r} grows no model: use init {{name: grow, from: FOLDER}}")
    else:
        init(model, seed, prefix)
    return model


def _require_kernel(config: FlexBertConfig) -> None:
    """Raise ConfigError for an attention backend that cannot run here: of the initial layers, or of the others."""
    device, alibi = "cuda" if torch.cuda.is_available() else "cpu", config.position.name == "alibi"
    for layer in (config.layer(0), config.layer(config.num_hidden_layers - 1)):
        attention = layer.attention
        require_backend(
            getattr(attention, "backend", "auto"),
            device,
            alibi=alibi,
            drops=getattr(attention, "probs_dropout", 0.0) > 0,
            head_dim=config.head_dim,
            place="attention" if attention is config.attention else "initial_layers.attention",
        )


def _with_head(config: FlexBertConfig, task: str, num_labels: int | None) -> FlexBertConfig:
    """The config with a head for the task. Raises ConfigError when there is none for masked-token training, and for
    num_labels of a task that has none."""
    if num_labels is not None and task in ("mlm", "encoder"):
        raise ConfigError(f"num_labels: {num_labels} for task {task!r}, which has no labels: leave it out")
    if task == "encoder":
        return config
    head: dict[str, Any] = config.head.model_dump()
    if HEADS.entries[config.head.name].task != task:
        if task == "mlm":
            raise ConfigError(f"head: {config.head.name!r} is no masked-token head: use mlm")
        is_classifier = isinstance(config.head, TaskConfig)
        shared = HEADS.entries[task].Config.model_fields if is_classifier else {}
        head = {**{key: value for key, value in head.items() if key in shared}, "name": task}
    if num_labels is not None:
        head["num_labels"] = num_labels
    if head == config.head.model_dump():
        return config
    return FlexBertConfig.from_dict({**config.to_dict(), "head": head})
