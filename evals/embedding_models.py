"""Embeddings of texts by a frozen encoder: ours on packed batches, transformers' on padded ones.

B texts, T packed tokens, D hidden.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from evals.batching import by_length
from evals.classifiers import Encoded, encode, load_tokenizer, longest
from evals.finetuning import autocast
from evals.interface import EvalConfig, Model
from evals.loading import Runtime, load_transformers, precision_of, require_encoder, runtime_of
from flexbert import from_hf
from flexbert_core.schema import RunError


class EmbeddingConfig(EvalConfig):
    """What evaluations of embeddings say of the model."""

    pooling: Literal["mean", "cls"] = Field(
        default="mean", description="of a text: the mean over its tokens, or the first"
    )
    max_length: int = Field(default=256, ge=8, description="tokens of a text at most; longer ones are cut, and counted")
    batch_tokens: int = Field(default=16384, ge=1, description="slots at once, which bounds memory")
    runtime: Runtime | None = Field(
        default=None, description="default: ours, unpadded, for architectures that it knows, else transformers, padded"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="auto: bf16 on a GPU")


class EmbeddingModel:
    """An encoder with its tokenizer. Hidden states are those after the final norm; special tokens count in means."""

    def __init__(self, folder: Path, config: EmbeddingConfig) -> None:
        """Raises ConfigError for a folder that cannot be loaded, RunError for one whose weights are not all there."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = precision_of(config.precision)
        self.tokenizer = load_tokenizer(folder)
        self.max_length = min(config.max_length, longest(folder, self.tokenizer))
        self.config = config
        self.model, self.runtime = load_encoder(folder, config.runtime)
        self.model = self.model.to(self.device).eval()

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], int]:
        """(B, D), in the order given, and how many texts were cut. Raises RunError for what are no numbers."""
        rows, cut = encode(self.tokenizer, texts, None, self.max_length)
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        pooled = self._packed if self.runtime == "flexbert" else self._padded
        for part in by_length([len(row.input_ids) for row in rows], self.config.batch_tokens):
            with autocast(self.device, self.precision):
                values = pooled([rows[number] for number in part]).float().cpu()
            for number, value in zip(part, values, strict=True):
                found[number] = value
        embeddings = torch.stack(found).numpy()
        if not np.isfinite(embeddings).all():
            raise RunError("the model's hidden states are no numbers")
        return embeddings, cut

    def _packed(self, batch: Sequence[Encoded]) -> Tensor:
        lengths = torch.tensor([len(row.input_ids) for row in batch], device=self.device)
        bounds = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        ids = torch.tensor([number for row in batch for number in row.input_ids], device=self.device)
        states = self.model(ids, bounds.int(), int(lengths.max()))
        if self.config.pooling == "cls":
            return states[bounds[:-1]]
        rows = torch.arange(len(batch), device=self.device).repeat_interleave(lengths)
        sums = states.new_zeros((len(batch), states.shape[1]), dtype=torch.float32).index_add_(0, rows, states.float())
        return sums / lengths[:, None]

    def _padded(self, batch: Sequence[Encoded]) -> Tensor:
        widest = max(len(row.input_ids) for row in batch)
        filler = self.model.config.pad_token_id or 0
        ids = torch.tensor([[*row.input_ids, *[filler] * (widest - len(row.input_ids))] for row in batch])
        real = torch.tensor([[1] * len(row.input_ids) + [0] * (widest - len(row.input_ids)) for row in batch])
        real = real.to(self.device)
        states = self.model(input_ids=ids.to(self.device), attention_mask=real).last_hidden_state
        if self.config.pooling == "cls":
            return states[:, 0]
        return (states.float() * real[..., None]).sum(1) / real.sum(1, keepdim=True)


def load_encoder(folder: Path, runtime: Runtime | None, **options: Any) -> tuple[Any, Runtime]:
    """The folder's encoder, float32, and what runs it. options: for transformers' loader."""
    found = runtime_of(folder, runtime)
    if found == "flexbert":
        return from_hf(folder, "encoder", trust_remote_code=True), found
    model, missing = load_transformers(folder, "AutoModel", "", **options)
    require_encoder(folder, model, missing)
    return model, found


class LastEmbeddingModel:
    """The model asked for last, kept for the next cell."""

    def __init__(self, config: EmbeddingConfig) -> None:
        self.config = config
        self._loaded: dict[str, EmbeddingModel] = {}

    def of(self, model: Model) -> EmbeddingModel:
        if model.digest not in self._loaded:
            self._loaded.clear()
            self._loaded[model.digest] = EmbeddingModel(model.folder, self.config)
        return self._loaded[model.digest]


def embedding_settings(config: EmbeddingConfig) -> dict[str, Any]:
    """What results depend on of it."""
    settings = config.model_dump(include={"pooling", "max_length", "runtime"})
    return {**settings, "precision": precision_of(config.precision)}
