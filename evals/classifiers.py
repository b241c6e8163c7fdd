"""Models to fine-tune: ours on packed batches for architectures that it knows, transformers' on padded ones else.

B sequences, T packed tokens, C classes.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data.keyed import torch_seed
from evals.loading import Runtime, load_transformers, model_type, require_encoder, runtime_of
from flexbert import FlexBertForMaskedLM, FlexBertForSequenceClassification, build, from_hf
from flexbert.dropout import TokenKeys, keyed_dropout
from flexbert.heads import MaskedLanguageHead
from flexbert.hf.read import read_weights
from flexbert_core.schema import ConfigError, RunError

Pooling = Literal["cls", "mean"]
_POOLER_FAMILIES = ("bert", "roberta")


class Encoded:
    """A tokenized text or pair."""

    __slots__ = ("input_ids", "token_type_ids")

    def __init__(self, input_ids: list[int], token_type_ids: list[int] | None) -> None:
        self.input_ids, self.token_type_ids = input_ids, token_type_ids


class Classifier(ABC):
    """A model of one row of scores for each text."""

    runtime: Runtime

    def __init__(self, model: Any, device: torch.device, starts_from: str = "fresh weights") -> None:
        """starts_from: where the layers between encoder and scores have their weights from."""
        self.model, self.device, self.starts_from = model.to(device), device, starts_from

    @abstractmethod
    def logits(self, batch: Sequence[Encoded], dropout_seed: int | None, first_row: int = 0) -> Tensor:
        """(B, C). dropout_seed: key of what is dropped in a step; None: nothing is. first_row: place of the first text
        in the step's batch."""

    def parameters(self) -> Any:
        return self.model.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def train(self, mode: bool = True) -> Any:
        return self.model.train(mode)

    def eval(self) -> Any:
        return self.model.eval()


def load_tokenizer(folder: Path) -> Any:
    """A folder's own. Raises ConfigError when there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
    except Exception as error:  # the loaders raise bare Exception among others
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{folder}: its tokenizer cannot be loaded: {said}") from None
    return tokenizer


def longest(folder: Path, tokenizer: Any) -> int:
    """Tokens that the model takes: what the tokenizer says, but no more than there are positions."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    positions = config.get("max_position_embeddings") or config.get("max_length_tokens") or 512
    if config.get("model_type") in ("roberta", "xlm-roberta", "camembert"):
        positions -= config.get("pad_token_id", 1) + 1  # counted from behind the padding's
    return int(min(positions, tokenizer.model_max_length))


def encode(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
) -> tuple[list[Encoded], int]:
    """Tokenized texts, and how many had to be cut."""
    arguments = [list(texts)] if pairs is None else [list(texts), list(pairs)]
    tokenizer.backend_tokenizer.no_padding()
    whole = tokenizer(*arguments, truncation=False, verbose=False, return_attention_mask=False)
    cut = sum(len(ids) > max_length for ids in whole["input_ids"])
    found = whole
    if cut:
        found = tokenizer(*arguments, truncation=True, max_length=max_length, return_attention_mask=False)
        tokenizer.backend_tokenizer.no_truncation()
    types = found.get("token_type_ids") or [None] * len(found["input_ids"])
    return [Encoded(ids, kinds) for ids, kinds in zip(found["input_ids"], types, strict=True)], cut


def load_classifier(
    folder: Path,
    num_labels: int,
    seed: int,
    device: torch.device,
    pooling: Pooling | None = None,
    start: Mapping[str, Tensor] | None = None,
    runtime: Runtime | None = None,
) -> Classifier:
    """A classifier with the folder's weights and a fresh last layer.

    start: a state of the same model, fine-tuned on another task, whose tensors replace those of the same shape.
    pooling: None: as transformers has it. runtime: None: ours where it knows the architecture.
    Raises ConfigError for a folder that neither can load, RunError for one whose weights are not all there.
    """
    model: Classifier
    if runtime_of(folder, runtime) == "flexbert":
        packed, starts_from = packed_model(folder, num_labels, seed, pooling)
        model = PackedClassifier(packed, device, starts_from)
    else:
        if pooling is not None:
            raise ConfigError("pooling: is for our own runtime; transformers' models have theirs")
        model = PaddedClassifier(*_padded_model(folder, num_labels, seed), folder, device)
    if start is not None:
        _take_over(model.model, start)
    return model


def _take_over(model: nn.Module, start: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    if odd := sorted(own.keys() ^ start.keys()):
        raise RunError(
            f"{odd[0]}: is in one of both models only: the weights to start from are of another architecture"
        )
    model.load_state_dict({name: start[name] if start[name].shape == own[name].shape else own[name] for name in own})


def packed_model(
    folder: Path, num_labels: int, seed: int, pooling: Pooling | None
) -> tuple[FlexBertForSequenceClassification, str]:
    """Ours, and where the layers between encoder and scores have their weights from. BERT and RoBERTa: their pooler,
    with the folder's weights where it has them. Others: what the masked-token head does before its decoder, with its
    weights, as transformers' ModernBERT has it."""
    try:
        pretrained: Any = from_hf(folder, trust_remote_code=True)
    except ConfigError:
        pretrained = from_hf(folder, "encoder", trust_remote_code=True)  # raises anew for what is not about the head
    encoder = pretrained.encoder if isinstance(pretrained, FlexBertForMaskedLM) else pretrained
    head: Any = pretrained.head if isinstance(pretrained, FlexBertForMaskedLM) else None
    with_pooler = model_type(folder) in _POOLER_FAMILIES
    by_head = isinstance(head, MaskedLanguageHead) and head.config.transform and not with_pooler
    node: dict[str, Any] = {"name": "classification", "num_labels": num_labels}
    if by_head:
        given = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("classifier_pooling", "cls")
        node |= {"pooling": pooling or given, "norm": True}
        node |= {"activation": head.config.activation, "dense_bias": head.config.dense_bias}
    else:
        node |= {"pooling": pooling or "cls"}
    config = encoder.config.model_validate({**encoder.config.to_dict(), "head": node, "init": "default"})
    model = build(config, "classification", seed=seed)
    model.encoder.load_state_dict(encoder.state_dict())
    if by_head:
        own = {"dense": head.dense, "norm": head.norm}
        for name, module in own.items():
            getattr(model.head, name).load_state_dict(module.state_dict())
        return model, "the masked-token head"
    if model_type(folder) == "bert":
        weights = read_weights(folder)
        pooler = {key.rpartition("pooler.dense.")[2]: weights[key] for key in weights if "pooler.dense." in key}
        if pooler:
            model.head.dense.load_state_dict(pooler)
            return model, "the folder's pooler"
    return model, "fresh weights"


def _padded_model(folder: Path, num_labels: int, seed: int) -> tuple[Any, str]:
    kind = "regression" if num_labels == 1 else "single_label_classification"
    options = {"num_labels": num_labels, "problem_type": kind, "ignore_mismatched_sizes": True}
    name = "AutoModelForSequenceClassification"
    model, missing = load_transformers(folder, name, " for classification", seed, **options)
    require_encoder(folder, model, missing)
    return model, f"transformers' {type(model).__name__}, fresh: {', '.join(missing) or 'nothing'}"


class PackedClassifier(Classifier):
    """Ours: sequences one after the other, without padding."""

    runtime = "flexbert"

    def __init__(self, model: Any, device: torch.device, starts_from: str = "fresh weights") -> None:
        super().__init__(model, device, starts_from)
        self.takes_types = model.config.embedding.model_dump().get("token_types", 0) >= 2

    def logits(self, batch: Sequence[Encoded], dropout_seed: int | None, first_row: int = 0) -> Tensor:
        lengths = torch.tensor([0, *(len(each.input_ids) for each in batch)], dtype=torch.int32)
        bounds = lengths.cumsum(0, dtype=torch.int32)
        ids = torch.tensor([number for each in batch for number in each.input_ids], dtype=torch.int64)
        types = None
        if self.takes_types and batch[0].token_type_ids is not None:
            types = torch.tensor([number for each in batch for number in each.token_type_ids or ()], dtype=torch.int64)
            types = types.to(self.device)
        cu_seqlens = bounds.to(self.device)
        keys = of_head = None
        if dropout_seed is not None:
            keys = TokenKeys(dropout_seed, first_row, cu_seqlens, len(ids))
            of_head = self._head_keys(keys, len(batch))
        with keyed_dropout(keys):
            hidden_states = self.model.encoder(ids.to(self.device), cu_seqlens, int(lengths.max()), types)
        with keyed_dropout(of_head):
            return self.model.head(hidden_states, cu_seqlens)

    def _head_keys(self, keys: TokenKeys, rows: int) -> TokenKeys:
        """Of the lines that the head drops from: a line for each row."""
        bounds = torch.arange(rows + 1, dtype=torch.int32, device=self.device)
        return TokenKeys(keys.seed, keys.first_row, bounds, rows)


class PaddedClassifier(Classifier):
    """Any of transformers': sequences padded to the longest of their batch. What it drops depends on microbatches."""

    runtime = "transformers"

    def __init__(self, model: Any, starts_from: str, folder: Path, device: torch.device) -> None:
        super().__init__(model, device, starts_from)
        self.padding_id = model.config.pad_token_id or 0
        self.takes_types = "token_type_ids" in load_tokenizer(folder).model_input_names

    def logits(self, batch: Sequence[Encoded], dropout_seed: int | None, first_row: int = 0) -> Tensor:
        longest = max(len(each.input_ids) for each in batch)

        def padded(rows: Sequence[Sequence[int]], by: int) -> Tensor:
            return torch.tensor([[*row, *[by] * (longest - len(row))] for row in rows], device=self.device)

        given = {
            "input_ids": padded([each.input_ids for each in batch], self.padding_id),
            "attention_mask": padded([[1] * len(each.input_ids) for each in batch], 0),
        }
        if self.takes_types and batch[0].token_type_ids is not None:
            given["token_type_ids"] = padded([each.token_type_ids or [] for each in batch], 0)
        if dropout_seed is None:
            return self.model(**given).logits
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices) if devices or self.device.type == "cpu" else nullcontext():
            torch.manual_seed(torch_seed(dropout_seed, "dropout", first_row))
            return self.model(**given).logits
