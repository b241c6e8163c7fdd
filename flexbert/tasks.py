"""Models for fine-tuning: the encoder under a classification head.   T tokens, B sequences, C labels, D hidden."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexbert.config import FlexBertConfig
from flexbert.encoder import FlexBertEncoder
from flexbert.registry import HEADS

IGNORE = -100


class ClassificationOutput(NamedTuple):
    """What a classifier returns."""

    loss: Tensor | None  # float32 scalar; None without labels
    logits: Tensor  # (B or T, C)
    hidden_states: Tensor  # (T, D), after the final norm


class _Classifier(nn.Module):
    def __init__(self, config: FlexBertConfig) -> None:
        super().__init__()
        self.encoder = FlexBertEncoder(config)
        self.head = HEADS.build(config.head, model=config)

    @property
    def config(self) -> FlexBertConfig:
        """The architecture, with the RoPE thetas now in use."""
        return self.encoder.config

    def _logits(
        self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, token_type_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        hidden_states = self.encoder(input_ids, cu_seqlens, max_seqlen, token_type_ids)
        return self.head(hidden_states, cu_seqlens), hidden_states


class FlexBertForSequenceClassification(_Classifier):
    """One row of scores per sequence."""

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> ClassificationOutput:
        """Scores (B, C) and, with labels, their mean loss.

        labels: (B,) int64: cross entropy, -100 = ignored; (B,) float: squared error of the one score, or (B, C) float:
        independent yes-no questions, binary cross entropy, -100 = ignored. Other arguments: see
        FlexBertEncoder.forward. Raises ValueError for labels of another shape or dtype, for classes where there is one
        score and, on the CPU, for answers outside 0 to 1.
        """
        logits, hidden_states = self._logits(input_ids, cu_seqlens, max_seqlen, token_type_ids)
        if labels is None:
            return ClassificationOutput(None, logits, hidden_states)
        scores = logits.float()
        if labels.is_floating_point() and labels.shape == scores.shape[:1] and scores.shape[1] == 1:
            loss = F.mse_loss(scores.squeeze(1), labels.float())
        elif labels.is_floating_point() and labels.shape == scores.shape:
            loss = _binary_cross_entropy(scores, labels.float())
        elif not labels.is_floating_point() and labels.shape == scores.shape[:1]:
            loss = _cross_entropy(scores, labels)
        else:
            raise ValueError(
                f"labels: {tuple(labels.shape)} {labels.dtype} do not fit scores {tuple(scores.shape)}: expected "
                "(sequences,) int64, (sequences,) float for num_labels 1, or (sequences, num_labels) float"
            )
        return ClassificationOutput(loss, logits, hidden_states)


class FlexBertForTokenClassification(_Classifier):
    """One row of scores per token."""

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> ClassificationOutput:
        """Scores (T, C) and, with labels (T,) int64, -100 = ignored, their mean cross entropy.

        Other arguments: see FlexBertEncoder.forward. Raises ValueError for labels of another shape or dtype, and for
        num_labels 1.
        """
        logits, hidden_states = self._logits(input_ids, cu_seqlens, max_seqlen, token_type_ids)
        if labels is None:
            return ClassificationOutput(None, logits, hidden_states)
        if labels.shape != logits.shape[:1]:
            raise ValueError(f"labels: {tuple(labels.shape)} for {len(logits)} tokens: expected one label for each")
        return ClassificationOutput(_cross_entropy(logits.float(), labels), logits, hidden_states)


def _cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that are not -100; 0 when there are none, so that every parameter has a gradient."""
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: {labels.dtype}: expected int64, the number of a class, or {IGNORE} to ignore one")
    if scores.shape[1] == 1:
        raise ValueError(
            "labels: of classes, for num_labels 1: with a single class the loss is always 0: set num_labels to the "
            "number of classes (a regression of sequences takes float labels)"
        )
    total = F.cross_entropy(scores, labels, reduction="sum", ignore_index=IGNORE)
    return total / (labels != IGNORE).sum().clamp_min(1)


def _binary_cross_entropy(scores: Tensor, answers: Tensor) -> Tensor:
    """Mean over the answers (B, C) that are not -100, each from 0, no, to 1, yes; 0 when there are none."""
    real = answers != IGNORE
    if answers.device.type == "cpu" and bool((wrong := real & ~((answers >= 0) & (answers <= 1))).any()):
        raise ValueError(
            f"labels: {answers[wrong][0].item():g} is no answer of a yes-no question: expected 0 to 1, or {IGNORE} to "
            "ignore one"
        )
    total = F.binary_cross_entropy_with_logits(scores, answers.where(real, 0), real.to(scores.dtype), reduction="sum")
    return total / real.sum().clamp_min(1)
