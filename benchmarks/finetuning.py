"""Fine-tuning on a text task: our unpadded harness against transformers' model in a plain loop, by turns.

    python -m benchmarks.finetuning MODEL DATA [--task rte] [--steps 12] [--rounds 3] [--precisions fp32 bf16]

MODEL: a folder of a BERT or ModernBERT. DATA: GLUE's folder. Both train on the same batches of the task's first rows,
with the same optimizer, in one process; `dynamic` pads a batch to its longest row, `max_length` to --max-length, as
transformers' own example does. Prints a JSON line for each precision; `speedup`: seconds of the peer over ours, the
median over rounds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from data.keyed import keyed_generator
from evals.classifiers import Encoded, encode, load_classifier, load_tokenizer
from evals.finetuning import autocast, loss_of
from evals.text_tasks import TextTask, load_task
from flexbert_core.schema import validate
from recipe.slots import OPTIMIZERS

BAR = 1.8


def training_step(model: Any, optimizer: Any, precision: str, batch: list[Encoded], labels: list[Any]) -> None:
    """One step, as both sides of the comparison take it."""
    with autocast(torch.device("cpu"), precision):
        logits = model.logits(batch, 1)
    loss_of(logits, labels, "classes").backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Plain:
    """The peer: transformers' model on batches that its tokenizer pads."""

    def __init__(self, folder: Path, num_labels: int, tokenizer: Any, padding: Any, max_length: int) -> None:
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=num_labels)
        self.tokenizer, self.padding, self.max_length = tokenizer, padding, max_length

    def logits(self, batch: list[Encoded], dropout_seed: int | None) -> Tensor:
        rows = [
            {"input_ids": row.input_ids}
            if row.token_type_ids is None
            else {"input_ids": row.input_ids, "token_type_ids": row.token_type_ids}
            for row in batch
        ]
        inputs = self.tokenizer.pad(
            {key: [row[key] for row in rows] for key in rows[0]},
            padding=self.padding,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return self.model(**inputs).logits


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("--task", default="rte")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    options = parser.parse_args()
    task = load_task(validate(TextTask, {"name": options.task}, "--task"), options.data, None)
    assert task.train is not None
    assert task.train.labels is not None
    tokenizer = load_tokenizer(options.model)
    rows, _ = encode(tokenizer, task.train.texts, task.train.pairs, options.max_length)
    order = keyed_generator(0, "benchmark").permutation(len(rows)).tolist()
    labels = task.train.labels
    firsts = range(0, options.steps * options.batch_size, options.batch_size)
    chosen = [order[first : first + options.batch_size] for first in firsts]
    batches = [([rows[row] for row in batch], [labels[row] for row in batch]) for batch in chosen]
    lengths = [len(row.input_ids) for row in rows]
    for precision in options.precisions:
        sides: dict[str, Callable[[list[Encoded], list[Any]], None]] = {}
        for side in ("ours", "dynamic", "max_length"):
            if side == "ours":
                model: Any = load_classifier(options.model, task.num_labels, 1, torch.device("cpu"))
            else:
                padding = True if side == "dynamic" else "max_length"
                model = Plain(options.model, task.num_labels, tokenizer, padding, options.max_length)
            model.model.train()
            config = OPTIMIZERS.parse({"name": "adamw", "weight_decay": 0.01})
            optimizer = OPTIMIZERS.build(config, model=model.model, lr=2e-5)

            sides[side] = partial(training_step, model, optimizer, precision)
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for each in sides.values():
            each(*batches[0])  # what is made at a first step
        for _ in range(options.rounds):
            for side, each in sides.items():
                start = time.perf_counter()
                for batch in batches:
                    each(*batch)
                seconds[side].append(time.perf_counter() - start)
        speedups = {
            side: [theirs / ours for theirs, ours in zip(seconds[side], seconds["ours"], strict=True)]
            for side in ("dynamic", "max_length")
        }
        line = {
            "benchmark": "finetuning",
            "task": options.task,
            "precision": precision,
            "batch_size": options.batch_size,
            "mean_length": round(statistics.mean(lengths), 1),
            "longest": max(lengths),
            "seconds_per_step": round(statistics.median(seconds["ours"]) / options.steps, 4),
            "speedup": {side: round(statistics.median(values), 3) for side, values in speedups.items()},
            "rounds": {side: [round(value, 3) for value in values] for side, values in speedups.items()},
            "bar": BAR,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
