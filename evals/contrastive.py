"""Fine-tuning for retrieval: queries against their documents, the others of the batch and hard negatives.

B examples of a batch, N negatives of an example.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from data.keyed import keyed_generator, torch_seed
from evals.beir import Example, RetrievalSet
from evals.bm25 import Bm25
from evals.finetuning import autocast
from evals.ranking import Ranking
from flexbert_core.schema import ConfigError, RunError, Schema, UserPath
from recipe.schedules import set_learning_rate
from recipe.slots import OPTIMIZERS

_MINED_FROM = 100  # the best documents that are not relevant


class Encoder(Protocol):
    """A model that finds documents and can be trained to."""

    columns: Sequence[str]
    model: Any
    device: torch.device
    precision: str

    def facts(self) -> dict[str, Any]: ...

    def rankings(
        self, documents: Mapping[str, str], queries: Mapping[str, str], count: int, batch_size: int
    ) -> dict[str, Ranking]:
        """By `columns`."""
        ...

    def features(self, texts: Sequence[str], is_query: bool) -> dict[str, Tensor]: ...

    def loss(self, temperature: float, microbatch: int | None) -> nn.Module: ...


class Tune(Schema):
    """How a model is trained for retrieval before it is scored."""

    examples: UserPath = Field(
        default="train",
        description="a split of each set (train), or a .tsv or .jsonl file of queries, positives and negatives, as MS "
        "MARCO's triples, after which one model is scored on all sets",
    )
    negatives: Literal["bm25", "model", "none"] | None = Field(
        default=None,
        description="hard negatives of a split: drawn from the 100 best that are not relevant, by BM25 or by the model "
        "before it is tuned; default: bm25. Triples bring theirs",
    )
    num_negatives: int = Field(
        default=1,
        ge=1,
        description="of each example of a split; those of the batch's other examples count, too. Triples bring theirs",
    )
    epochs: int = Field(default=1, ge=1, description="passes over the examples")
    lr: float = Field(default=5e-5, gt=0, description="peak learning rate (arXiv 2412.13663 sweeps 1e-5 to 1e-4)")
    warmup: float = Field(
        default=0.05, ge=0, lt=1, description="share of the steps over which lr rises; then it falls to 0"
    )
    batch_size: int = Field(default=32, ge=2, description="examples a step")
    microbatch: int | None = Field(
        default=None, ge=1, description="texts at once (GradCache, arXiv 2101.06983), which bounds memory; default: all"
    )
    temperature: float | None = Field(
        default=None, gt=0, description="of the softmax over documents; default: 0.05 of one vector, 1 of several"
    )
    optimizer: Annotated[Any, *OPTIMIZERS.slot()] = Field(default="stableadamw", description="with its weight_decay")
    gradient_clip_norm: float | None = Field(
        default=1.0, gt=0, description="global norm (sentence-transformers: 1.0); null: none"
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1, description="one training for each")
    rows: int | None = Field(default=None, ge=2, description="examples at most, drawn by the seed; default: all")

    @model_validator(mode="after")
    def _check(self) -> "Tune":
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: a value stands there twice: {self.seeds}")
        for key in ("negatives", "num_negatives"):
            if self.of_triples and key in self.model_fields_set and getattr(self, key) is not None:
                raise ValueError(f"{key}: the triples of {self.examples} bring theirs: leave it out")
        return self

    @property
    def of_triples(self) -> bool:
        return self.examples.endswith((".tsv", ".jsonl"))


def mined(data: RetrievalSet, tune: Tune, encoder: Encoder, bm25: Bm25, batch_size: int, seed: int) -> list[Example]:
    """An example for each relevant document of each query of the split to train on. Where fewer hard negatives are
    found than wanted, others are drawn from the corpus."""
    judged = data.splits[tune.examples]
    wanted = 0 if tune.negatives == "none" else tune.num_negatives
    depth = _MINED_FROM + max(len(row) for row in judged.relevance.values())
    found: Mapping[str, Mapping[str, float]] = {}
    if wanted and tune.negatives == "model":
        found = encoder.rankings(data.documents, judged.queries, depth, batch_size)[encoder.columns[0]]
    elif wanted:
        found = dict(zip(judged.queries, bm25.search(list(judged.queries.values()), depth), strict=True))
    names = list(data.documents)
    examples = []
    for number, (query, text) in enumerate(sorted(judged.queries.items())):
        row = judged.relevance[query]
        relevant = sorted(name for name, score in row.items() if score > 0 and name in data.documents)
        hard = [name for name in found.get(query, ()) if row.get(name, 0) <= 0][:_MINED_FROM]
        for place, name in enumerate(relevant):
            draw = keyed_generator(seed, "hard negatives", number, place)
            chosen = [hard[index] for index in draw.permutation(len(hard))[:wanted]]
            while len(chosen) < wanted:
                other = names[int(draw.integers(len(names)))]
                if row.get(other, 0) <= 0:
                    chosen.append(other)
            negatives = tuple(data.documents[other] for other in chosen)
            examples.append(Example(text, data.documents[name], negatives))
    if len(examples) < 2:
        raise ConfigError(f"{data.name}: {tune.examples}: {len(examples)} relevant documents: too few to train on")
    return examples


def drawn(examples: Sequence[Example], rows: int | None, seed: int) -> list[Example]:
    """At most so many of them."""
    if rows is None or rows >= len(examples):
        return list(examples)
    order = keyed_generator(seed, "examples of a sample").permutation(len(examples))[:rows]
    return [examples[row] for row in sorted(order)]


def fine_tune(encoder: Encoder, examples: Sequence[Example], tune: Tune, seed: int) -> dict[str, Any]:
    """Train in place; returns facts: examples, negatives of each, steps, the mean loss of each epoch.

    A batch holds no text twice, since a positive must not be another example's negative: sentence-transformers'
    NoDuplicatesBatchSampler. Order and dropout are functions of the seed. Raises RunError when the loss is no number.
    """
    from transformers import get_linear_schedule_with_warmup

    temperature = tune.temperature or (0.05 if len(encoder.columns) == 1 else 1.0)
    loss = encoder.loss(temperature, tune.microbatch)
    epochs = [_batches(examples, tune.batch_size, torch_seed(seed, "order", epoch)) for epoch in range(tune.epochs)]
    steps = sum(len(batches) for batches in epochs)
    optimizer = OPTIMIZERS.build(tune.optimizer, model=encoder.model, lr=tune.lr)
    set_learning_rate(optimizer, tune.lr)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(tune.warmup * steps), steps + 1)
    losses, step = [], 0
    encoder.model.train()
    devices = [encoder.device] if encoder.device.type == "cuda" else []
    for number, batches in enumerate(epochs, 1):
        total = 0.0
        for rows in batches:
            batch = [examples[row] for row in rows]
            with torch.random.fork_rng(devices=devices), autocast(encoder.device, encoder.precision):
                torch.manual_seed(torch_seed(seed, "dropout", step))
                value = loss(_columns(encoder, batch), None)
                value.backward()
            total += float(value.detach()) * len(batch)
            if tune.gradient_clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(encoder.model.parameters(), tune.gradient_clip_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
        losses.append(total / sum(len(rows) for rows in batches))
        if not math.isfinite(losses[-1]):
            raise RunError(f"the loss of epoch {number} is {losses[-1]}: lower tune.lr ({tune.lr:g})")
    return {"examples": len(examples), "negatives": len(examples[0].negatives), "steps": steps, "losses": losses}


def _batches(examples: Sequence[Example], batch_size: int, seed: int) -> list[list[int]]:
    from datasets import Dataset
    from sentence_transformers.sampler import NoDuplicatesBatchSampler

    columns = {"query": [each.query for each in examples], "positive": [each.positive for each in examples]}
    columns |= {f"negative {n}": [each.negatives[n] for each in examples] for n in range(len(examples[0].negatives))}
    table = Dataset.from_dict(columns)
    return list(NoDuplicatesBatchSampler(table, batch_size, drop_last=False, generator=torch.Generator(), seed=seed))


def _columns(encoder: Encoder, batch: Sequence[Example]) -> list[dict[str, Tensor]]:
    """Tokens of the queries, the positives and each place of negatives; documents are padded alike, as PyLate needs."""
    documents = [each.positive for each in batch]
    for n in range(len(batch[0].negatives)):
        documents += [each.negatives[n] for each in batch]
    tokens = encoder.features(documents, False)
    parts = {name: tensor.split(len(batch)) for name, tensor in tokens.items()}
    columns = [{name: part[n] for name, part in parts.items()} for n in range(1 + len(batch[0].negatives))]
    return [encoder.features([each.query for each in batch], True), *columns]
