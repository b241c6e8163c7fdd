"""Fine-tuning a classifier on one task: unpadded, every draw keyed by the seed, the best of its evaluations kept."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from data.keyed import keyed_generator, torch_seed
from evals.classifiers import Classifier, Encoded
from evals.text_scores import scored
from flexbert_core.schema import RunError
from recipe.schedules import set_learning_rate
from recipe.slots import OPTIMIZERS

Labels = Sequence[Any]
IGNORE = -100


@dataclass(frozen=True)
class Split:
    """Tokenized rows. labels: class numbers or float scores, or for tokens a list of class numbers for each row, -100 =
    none; None: hidden."""

    rows: Sequence[Encoded]
    labels: Labels | None


@dataclass(frozen=True)
class Plan:
    """How to train. optimizer: the slot's config, whose weight decay is the grid's. early_stopping: evaluations without
    a better score after which training ends; None: never."""

    lr: float
    epochs: int
    batch_size: int
    seed: int
    optimizer: Any
    warmup: float
    early_stopping: int | None
    microbatch_tokens: int
    precision: Literal["fp32", "bf16"]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bfloat16 products where asked for."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def fine_tune(
    model: Classifier,
    train: Split,
    score: Callable[[Classifier], dict[str, float]],
    plan: Plan,
    kind: Literal["classes", "score", "tokens"],
    device: torch.device,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train with a linear warmup and a linear fall to 0; score after each epoch.

    score: of the model as it stands; its `score` chooses the best. The loss of a batch is the mean over its rows, or
    with kind tokens over its labelled tokens, however it is split into microbatches. Returns facts (the best scores,
    their epoch, losses, steps) and the best weights. Raises RunError when the loss is no number.
    """
    assert train.labels is not None
    optimizer = OPTIMIZERS.build(plan.optimizer, model=model.model, lr=plan.lr)
    steps_per_epoch = math.ceil(len(train.rows) / plan.batch_size)
    steps = steps_per_epoch * plan.epochs
    warmup = round(plan.warmup * steps)
    best: dict[str, Any] = {}
    weights: dict[str, Tensor] = {}
    losses, since, step = [], 0, 0
    for epoch in range(plan.epochs):
        order = keyed_generator(plan.seed, "fine-tuning order", epoch).permutation(len(train.rows))
        total = 0.0
        model.train()
        for first in range(0, len(order), plan.batch_size):
            chosen = order[first : first + plan.batch_size].tolist()
            set_learning_rate(optimizer, plan.lr * _share(step, warmup, steps))
            total += _step(model, train, chosen, plan, kind, device, step) * len(chosen)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
        losses.append(total / len(order))
        if not math.isfinite(losses[-1]):
            raise RunError(f"the loss of epoch {epoch + 1} is {losses[-1]}: lower lr ({plan.lr:g})")
        found = score(model)
        progress(f"epoch {epoch + 1}/{plan.epochs}  loss {losses[-1]:.3f}  score {found['score']:.4f}")
        if not best or found["score"] > best["score"]:
            best, since = {**found, "epoch": epoch + 1}, 0
            weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
        else:
            since += 1
            if plan.early_stopping is not None and since >= plan.early_stopping:
                break
    return {**best, "losses": losses, "steps": step}, weights


def _share(step: int, warmup: int, steps: int) -> float:
    """Of the peak learning rate in a step, counted from 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / max(steps - warmup, 1)


def _step(
    model: Classifier,
    train: Split,
    chosen: Sequence[int],
    plan: Plan,
    kind: str,
    device: torch.device,
    step: int,
) -> float:
    """Gradients of one batch; its mean loss."""
    assert train.labels is not None
    loss, whole = 0.0, _weight(train.labels, chosen, kind)
    first_row, dropout_seed = 0, torch_seed(plan.seed, "dropout", step)
    for part in _parts(train.rows, chosen, plan.microbatch_tokens):
        with autocast(device, plan.precision):
            logits = model.logits([train.rows[row] for row in part], dropout_seed, first_row)
        first_row += len(part)
        labels = [train.labels[row] for row in part]
        share = loss_of(logits, labels, kind) * (_weight(train.labels, part, kind) / max(whole, 1))
        share.backward()
        loss += float(share.detach())
    return loss


def _weight(labels: Labels, rows: Sequence[int], kind: str) -> int:
    """What a mean is over: rows, or labelled tokens."""
    return sum(label != IGNORE for row in rows for label in labels[row]) if kind == "tokens" else len(rows)


def loss_of(logits: Tensor, labels: Labels, kind: str) -> Tensor:
    """Mean over rows: cross entropy of classes, or squared error of the one score. kind tokens: mean cross entropy of
    the labelled tokens, logits (T, C) of all rows' tokens; 0 without any."""
    scores = logits.float()
    if kind == "tokens":
        targets = torch.tensor([label for row in labels for label in row], dtype=torch.int64, device=scores.device)
        total = F.cross_entropy(scores, targets, reduction="sum", ignore_index=IGNORE)
        return total / (targets != IGNORE).sum().clamp_min(1)
    if kind == "classes":
        return F.cross_entropy(scores, torch.tensor(labels, dtype=torch.int64, device=scores.device))
    return F.mse_loss(scores.squeeze(1), torch.tensor(labels, dtype=torch.float32, device=scores.device))


def _parts(rows: Sequence[Encoded], chosen: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """The chosen rows, so many at once that a padded batch of them has at most so many slots."""
    part: list[int] = []
    widest = 0
    for row in chosen:
        length = len(rows[row].input_ids)
        if part and max(widest, length) * (len(part) + 1) > most_tokens:
            yield part
            part, widest = [], 0
        part.append(row)
        widest = max(widest, length)
    yield part


@torch.no_grad()
def predict(
    model: Classifier, rows: Sequence[Encoded], device: torch.device, precision: str, most_tokens: int
) -> Tensor:
    """Scores of each row, (rows, C) float32 on the CPU. Rows of like length go together."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda row: len(rows[row].input_ids))
    found: list[Tensor] = []
    for part in _parts(rows, order, most_tokens):
        with autocast(device, precision):
            found.append(model.logits([rows[row] for row in part], None).float().cpu())
    scores = torch.cat(found)
    if not bool(scores.isfinite().all()):
        raise RunError("the model's scores are no numbers")
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.tensor(order)] = torch.arange(len(order))
    return scores[back]


def answers(scores: Tensor, kind: str) -> list[Any]:
    """Class numbers, or scores as they are."""
    return scores.argmax(1).tolist() if kind == "classes" else scores.squeeze(1).tolist()


def dev_scores(
    model: Classifier,
    dev: Mapping[str, Split],
    metrics: Sequence[str],
    kind: str,
    device: torch.device,
    precision: str,
    most_tokens: int,
) -> dict[str, float]:
    """Metrics of each split that has labels, under its name, and `score`, the mean over splits."""
    found: dict[str, float] = {}
    scores = []
    for name, split in dev.items():
        if split.labels is None:
            continue
        values = scored(
            metrics, split.labels, answers(predict(model, split.rows, device, precision, most_tokens), kind)
        )
        scores.append(values.pop("score"))
        found |= {f"{metric} {name}".strip(): value for metric, value in values.items()}
    return {**found, "score": math.fsum(scores) / len(scores)}
