"""Models that restore hidden tokens: ours on packed batches, transformers' on padded ones.

B rows, S slots, T packed tokens, M hidden tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from evals.batching import by_length
from evals.classifiers import load_tokenizer, longest
from evals.finetuning import autocast
from evals.interface import EvalConfig, Model
from evals.loading import Runtime, load_transformers, precision_of, runtime_of
from flexbert import FlexBertForMaskedLM, from_hf
from flexbert.kernels import linear
from flexbert_core.schema import ConfigError, RunError

_MOST_SCORES = 2**27  # numbers of logits that exist at once: 512 MiB


class MaskedModelConfig(EvalConfig):
    """What evaluations of hidden tokens say of the model."""

    max_length: int = Field(
        default=512, ge=8, description="tokens of a row at most, with special ones; longer ones are cut"
    )
    batch_tokens: int = Field(default=8192, ge=1, description="slots at once, which bounds memory")
    runtime: Runtime | None = Field(
        default=None, description="default: ours, unpadded, for architectures that it knows, else transformers, padded"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="auto: bf16 on a GPU")


@dataclass(frozen=True)
class Hidden:
    """A row with hidden tokens. positions: of them, rising; targets: what stood there."""

    input_ids: list[int]
    positions: list[int]
    targets: list[int]


class MaskedModel:
    """A model with its tokenizer."""

    def __init__(self, folder: Path, config: MaskedModelConfig) -> None:
        """Raises RunError for a folder without a masked-token head or mask token, ConfigError for one that cannot be
        loaded."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = precision_of(config.precision)
        self.tokenizer = load_tokenizer(folder)
        if not self.tokenizer.is_fast:
            raise RunError(f"{folder}: its tokenizer has no tokenizer.json, which tells where in a text its tokens are")
        if self.tokenizer.mask_token_id is None:
            raise RunError(f"{folder}: its tokenizer has no mask token: it cannot be asked for hidden tokens")
        self.mask_token_id = int(self.tokenizer.mask_token_id)
        self.max_length = min(config.max_length, longest(folder, self.tokenizer))
        self.batch_tokens = config.batch_tokens
        self.model, self.runtime = load_masked(folder, config.runtime)
        self.model = self.model.to(self.device).eval()
        self.special = set(self.tokenizer.all_special_ids)

    def encode(self, texts: Sequence[str]) -> Any:
        """input_ids with special tokens, offset_mapping, and encodings, of texts cut to max_length."""
        self.tokenizer.backend_tokenizer.no_padding()
        return self.tokenizer(
            list(texts), truncation=True, max_length=self.max_length, return_offsets_mapping=True, padding=False
        )

    @torch.no_grad()
    def scores(self, rows: Sequence[Hidden]) -> list[tuple[list[float], list[bool]]]:
        """Of each row: log-probabilities (nats) of what was hidden, and whether it is the model's first choice.

        Raises RunError for scores that are no numbers.
        """
        found: list[tuple[list[float], list[bool]]] = [([], [])] * len(rows)
        score = self._packed if self.runtime == "flexbert" else self._padded
        most = self.batch_tokens
        if self.runtime == "transformers":
            most = min(most, max(1, _MOST_SCORES // int(self.model.config.vocab_size)))
        for part in by_length([len(row.input_ids) for row in rows], most):
            batch = [rows[number] for number in part]
            with autocast(self.device, self.precision):
                log_probs, correct = score(batch)
            if not bool(log_probs.isfinite().all()):
                raise RunError("the model's scores are no numbers")
            counts = [len(row.positions) for row in batch]
            for number, values, hits in zip(part, log_probs.split(counts), correct.split(counts), strict=True):
                found[number] = (values.tolist(), hits.tolist())
        return found

    def _packed(self, batch: Sequence[Hidden]) -> tuple[Tensor, Tensor]:
        lengths = [len(row.input_ids) for row in batch]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        ids = torch.tensor([number for row in batch for number in row.input_ids], device=self.device)
        starts = bounds.tolist()
        places = [start + at for start, row in zip(starts, batch, strict=False) for at in row.positions]
        index = torch.tensor(places, dtype=torch.int64, device=self.device)
        targets = torch.tensor([target for row in batch for target in row.targets], device=self.device)
        model: FlexBertForMaskedLM = self.model
        weight, bias = model.head.decoder(model.encoder.token_table)
        hidden_states = model.encoder(ids, bounds.int().to(self.device), max(lengths), wanted=index)
        states = model.head(hidden_states)
        chunk = max(1, _MOST_SCORES // len(weight))
        done = [
            _scored(linear(part, weight, bias), those)
            for part, those in zip(states.split(chunk), targets.split(chunk), strict=True)
        ]
        return torch.cat([each[0] for each in done]), torch.cat([each[1] for each in done])

    def _padded(self, batch: Sequence[Hidden]) -> tuple[Tensor, Tensor]:
        widest = max(len(row.input_ids) for row in batch)
        filler = self.model.config.pad_token_id or 0
        ids = torch.tensor([[*row.input_ids, *[filler] * (widest - len(row.input_ids))] for row in batch])
        mask = torch.tensor([[1] * len(row.input_ids) + [0] * (widest - len(row.input_ids)) for row in batch])
        logits = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).logits
        where = [(number, at) for number, row in enumerate(batch) for at in row.positions]
        chosen = logits[[number for number, _ in where], [at for _, at in where]]
        targets = torch.tensor([target for row in batch for target in row.targets], device=logits.device)
        return _scored(chosen, targets)


def _scored(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (M,) float32 and hits (M,) bool, on the CPU, of logits (M, V)."""
    wide = logits.float()
    log_probs = wide.gather(1, targets[:, None]).squeeze(1) - wide.logsumexp(1)
    return log_probs.cpu(), (wide.argmax(1) == targets).cpu()


def load_masked(folder: Path, runtime: Runtime | None) -> tuple[Any, Runtime]:
    """A folder's model, in float32 on the CPU, and whose it is. Raises RunError for one without a masked-token head,
    ConfigError for one that cannot be loaded."""
    found = runtime_of(folder, runtime)
    if found == "flexbert":
        try:
            return from_hf(folder, trust_remote_code=True), found
        except ConfigError as error:
            from_hf(folder, "encoder", trust_remote_code=True)  # raises anew for what is not about the head
            raise RunError(_no_head(folder, str(error).removeprefix(f"{folder}: ").split(":")[0])) from None
    model, missing = load_transformers(folder, "AutoModelForMaskedLM", " for masked tokens")
    if missing:
        raise RunError(_no_head(folder, missing[0]))
    return model, found


def _no_head(folder: Path, weight: str) -> str:
    return f"{folder}: has no masked-token head ({weight} is not in its weights): it cannot restore hidden tokens"


class LastMaskedModel:
    """The model asked for last, kept for the next cell."""

    def __init__(self, config: MaskedModelConfig) -> None:
        self.config = config
        self._loaded: dict[str, MaskedModel] = {}

    def of(self, model: Model) -> MaskedModel:
        if model.digest not in self._loaded:
            self._loaded.clear()
            self._loaded[model.digest] = MaskedModel(model.folder, self.config)
        return self._loaded[model.digest]


def model_settings(config: MaskedModelConfig) -> dict[str, Any]:
    """What results depend on of it."""
    settings = config.model_dump(include={"max_length", "runtime"})
    return {**settings, "precision": precision_of(config.precision)}
