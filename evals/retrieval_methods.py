"""Ways to find documents with a model, as a file of configs/eval/ names them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from data.keyed import torch_seed
from evals.contrastive import Encoder, Tune
from flexbert_core.schema import Schema

LABEL = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"


class Method(Schema):
    """One way to find documents with a model."""

    name: Literal["single_vector", "multi_vector"] = Field(
        description="one vector for each text, compared by cosine; or one for each token, by MaxSim (ColBERT)"
    )
    label: str | None = Field(
        default=None, pattern=LABEL, description="in tables, where a method comes twice; default: name"
    )
    pooling: Literal["mean", "cls"] | None = Field(
        default=None,
        description="of one vector; default: as the folder says (its modules.json), else mean",
    )
    max_length: int | None = Field(
        default=None,
        ge=8,
        description="of one vector: tokens of a text; default: as the folder says, else what the model takes",
    )
    query_prefix: str | None = Field(
        default=None, description="of one vector: before queries; default: the folder's prompt"
    )
    document_prefix: str | None = Field(default=None, description="of one vector: before documents, likewise")
    query_length: int | None = Field(default=None, ge=8, description="of several: tokens of a query; default: 32")
    document_length: int | None = Field(
        default=None, ge=8, description="of several: tokens of a document; default: 180"
    )
    dimensions: int | None = Field(
        default=None, ge=1, description="of several: width of a token's vector; default: 128"
    )
    tune: Tune | None = Field(default=None, description="train it for retrieval, too")
    untuned: bool = Field(default=True, description="with tune: score the model as it is, too")

    @model_validator(mode="after")
    def _check(self) -> "Method":
        single = ("pooling", "max_length", "query_prefix", "document_prefix")
        for key in ("query_length", "document_length", "dimensions") if self.name == "single_vector" else single:
            if getattr(self, key) is not None:
                raise ValueError(f"{key}: says nothing of {self.name}")
        return self

    @property
    def shown(self) -> str:
        return self.label or self.name

    @property
    def labels(self) -> list[str]:
        """In tables: of the model as it is, and tuned."""
        plain = [self.shown] if self.tune is None or self.untuned else []
        return plain if self.tune is None else [*plain, tuned(self.shown)]


def tuned(label: str) -> str:
    return f"{label}-tuned"


def spelled_out(node: Any) -> Any:
    """A method by its name alone, as a mapping."""
    return {"name": node} if isinstance(node, str) else node


@dataclass(frozen=True)
class Work:
    """What a cell computes: a method on some sets. seed: of the tuning; None: the model as it is."""

    method: Method
    sets: tuple[str, ...]
    seed: int | None

    @property
    def label(self) -> str:
        return self.method.shown if self.seed is None else tuned(self.method.shown)

    @property
    def tune(self) -> Tune:
        """Of one that has a seed."""
        assert self.method.tune is not None
        return self.method.tune


def work_of(methods: Sequence[Method], sets: Sequence[str]) -> dict[str, Work]:
    """All there is to compute, by the names of its cells. What is tuned on a split is tuned for each set, what is tuned
    on triples once for all of them."""
    found: dict[str, Work] = {}
    for method in methods:
        if method.tune is None or method.untuned:
            found |= {f"{method.shown}/{name}": Work(method, (name,), None) for name in sets}
        if method.tune is None:
            continue
        groups = {"all": tuple(sets)} if method.tune.of_triples else {name: (name,) for name in sets}
        for name, group in groups.items():
            found |= {
                f"{tuned(method.shown)}/{name}-seed{seed}": Work(method, group, seed) for seed in method.tune.seeds
            }
    return found


def encoder_of(method: Method, folder: Path, device: torch.device, precision: str, seed: int) -> Encoder:
    """The model as the method reads it. seed: of what is fresh in it."""
    if method.name == "single_vector":
        from evals.dense import SingleVector

        prefixes = (method.query_prefix, method.document_prefix)
        return SingleVector(folder, method.pooling, method.max_length, prefixes, device, precision)
    from evals.late_interaction import MultiVector

    lengths = (method.query_length, method.document_length)
    return MultiVector(folder, method.dimensions, lengths, device, precision, torch_seed(seed, "late interaction"))
