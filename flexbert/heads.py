"""Slot `head`: from the residual stream to scores.

M masked tokens, B sequences, T packed tokens, D hidden, V vocabulary.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flexbert.config import FlexBertConfig, ModelComponent
from flexbert.dropout import Dropout
from flexbert.layers import Linear, build_norm
from flexbert.registry import HEADS, Activation, build_activation
from flexbert_core.schema import Component


class Decoder(Linear):
    """A matrix (V, D), of which the loss reads the weight, in chunks: the module itself is never called, and what hangs
    on its calls would never act."""

    @staticmethod
    def weight_of(module: nn.Module) -> Tensor:
        """(V, D). Raises ValueError for a module that does more than multiply, and for hooks."""
        fault = ""
        if type(module).forward not in (Linear.forward, nn.Linear.forward) or "forward" in vars(module):
            fault = f"{type(module).__name__} has a forward of its own"
        elif module.bias is not None:
            fault = "has a bias, beside which decoder_bias would be the model's"
        elif any(vars(module).get(kind) for kind in _HOOKS):
            fault = "has hooks"
        if fault:
            raise ValueError(
                f"head.output: {fault}, which never acts, since the loss reads the weight only: merge it into the "
                "weight (a parametrization serves too), or register a head"
            )
        return module.weight  # pyright: ignore[reportReturnType]


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Head(nn.Module):
    """What a masked-token head offers: forward, the part before the decoder, and the decoder, which the loss applies in
    chunks."""

    task: ClassVar[str] = "mlm"

    def decoder(self, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight (V, D) and bias (V,) or None, given the token table (V, D) to tie to."""
        raise NotImplementedError


@HEADS.register("mlm")
class MaskedLanguageHead(Head):
    """norm(act(dense(x))), then the token table as decoder, plus a bias (BERT; ModernBERT without dense bias)."""

    class Config(ModelComponent):
        transform: bool = Field(True, description="norm(act(dense(x))) before the decoder (CrammingBERT, NeoBERT: no)")
        activation: Activation = Field("gelu", description="after the dense layer (slot activation)")
        dense_bias: bool = Field(False, description="bias of the dense layer (BERT: yes)")
        tied: bool = Field(True, description="the token table is the decoder (NeoBERT: no, a matrix of its own)")
        decoder_bias: bool = Field(True, description="one learned offset per vocabulary entry")

        def unread(self, model: FlexBertConfig) -> list[str]:
            if self.transform:
                return []
            fields = type(self).model_fields
            given = [name for name in ("activation", "dense_bias") if getattr(self, name) != fields[name].default]
            return [
                f"{name}: {getattr(self, name)} is of the transform, which is false: leave it out" for name in given
            ]

    def __init__(self, config: Config, *, model: FlexBertConfig) -> None:
        super().__init__()
        self.config = config
        if config.transform:
            self.dense = Linear(model.hidden_size, model.hidden_size, bias=config.dense_bias)
            self.activation = build_activation(config.activation)
            self.norm = build_norm(model.norm, model.hidden_size)
        self.output = None if config.tied else Decoder(model.hidden_size, model.vocab_size, bias=False)
        self.decoder_bias = nn.Parameter(torch.zeros(model.vocab_size)) if config.decoder_bias else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(M, D) -> (M, D)."""
        if not self.config.transform:
            return hidden_states
        return self.norm(self.activation(self.dense(hidden_states)))

    def decoder(self, embeddings: Tensor) -> tuple[Tensor, Tensor | None]:
        return embeddings if self.output is None else Decoder.weight_of(self.output), self.decoder_bias


class TaskConfig(Component):
    """Fields of the heads for fine-tuning."""

    num_labels: int = Field(2, ge=1, le=2**24, description="scores per sequence or token; 1: a regression")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout probability before the classifier (BERT: 0.1)")


class TaskHead(nn.Module):
    """What a head for fine-tuning offers: (hidden_states (T, D), cu_seqlens (B + 1,) int32) -> scores."""

    task: ClassVar[str]


@HEADS.register("classification")
class SequenceClassificationHead(TaskHead):
    """classifier(drop(norm(act(dense(pool(x)))))): one row of scores per sequence; an empty sequence pools to zeros.

    The defaults are BERT's pooler; ModernBERT: pooling either, activation gelu, dense_bias false, norm true.
    """

    task: ClassVar[str] = "classification"

    class Config(TaskConfig):
        pooling: Literal["cls", "mean"] = Field("cls", description="the first token, or the mean over all of them")
        dense_bias: bool = Field(True, description="bias of the dense layer")
        activation: Activation = Field("tanh", description="after the dense layer (slot activation)")
        norm: bool = Field(False, description="the model's norm after the activation")

    def __init__(self, config: Config, *, model: FlexBertConfig) -> None:
        super().__init__()
        self.config = config
        self.dense = Linear(model.hidden_size, model.hidden_size, bias=config.dense_bias)
        self.activation = build_activation(config.activation)
        self.norm = build_norm(model.norm, model.hidden_size) if config.norm else nn.Identity()
        self.dropout = Dropout(config.dropout)
        self.classifier = Linear(model.hidden_size, config.num_labels, bias=True)

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor) -> Tensor:
        """-> (B, num_labels)."""
        pool = _first_tokens if self.config.pooling == "cls" else _mean_tokens
        pooled = self.norm(self.activation(self.dense(pool(hidden_states, cu_seqlens))))
        return self.classifier(self.dropout(pooled))


@HEADS.register("tokens")
class TokenClassificationHead(TaskHead):
    """classifier(drop(x)): one row of scores per token (BERT)."""

    task: ClassVar[str] = "tokens"

    class Config(TaskConfig):
        pass

    def __init__(self, config: Config, *, model: FlexBertConfig) -> None:
        super().__init__()
        self.config = config
        self.dropout = Dropout(config.dropout)
        self.classifier = Linear(model.hidden_size, config.num_labels, bias=True)

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor) -> Tensor:
        """-> (T, num_labels)."""
        return self.classifier(self.dropout(hidden_states))


def _first_tokens(hidden_states: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B, D): each sequence's first; of an empty one, the row of zeros behind the last token."""
    starts = torch.where(cu_seqlens.diff() > 0, cu_seqlens[:-1], len(hidden_states))
    return F.pad(hidden_states, (0, 0, 0, 1)).index_select(0, starts)


def _mean_tokens(hidden_states: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B, D), summed in float32."""
    lengths = cu_seqlens.diff()
    sums = torch.segment_reduce(hidden_states.float(), "sum", lengths=lengths, axis=0, unsafe=True, initial=0)
    return (sums / lengths.clamp_min(1).unsqueeze(1)).to(hidden_states.dtype)
