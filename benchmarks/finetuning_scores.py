"""Scores of fine-tuning: our unpadded harness against transformers' model in a plain padded loop, over seeds.

    python -m benchmarks.finetuning_scores MODEL DATA [--task mrpc] [--seeds 0 1 2] [--epochs 2]

MODEL: a folder of a BERT or ModernBERT. DATA: GLUE's folder. Both see a seed's rows in the same order, with AdamW of
the same settings and a linear schedule; fresh weights and dropout are drawn by each in its own way. A score is the mean
of the task's metrics on its dev set after the last epoch. Prints a JSON line: scores by seed, the mean difference (ours
less theirs) with its 95 % interval over seeds (paired t), and whether 0 lies in it.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup, set_seed

from data.keyed import keyed_generator, torch_seed
from evals.classifiers import encode, load_classifier, load_tokenizer
from evals.finetuning import Plan, Split, dev_scores, fine_tune
from evals.text_tasks import TaskData, TextTask, load_task
from flexbert_core.schema import validate
from recipe.slots import OPTIMIZERS

_WARMUP, _CPU = 0.06, torch.device("cpu")


def ours(folder: Path, task: TaskData, seed: int, options: argparse.Namespace) -> float:
    """By the harness that `main.py eval glue` runs."""
    assert task.train is not None
    tokenizer = load_tokenizer(folder)

    def split(rows: Any) -> Split:
        return Split(encode(tokenizer, rows.texts, rows.pairs, options.max_length)[0], rows.labels)

    settings = {"name": "adamw", "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    plan = Plan(
        lr=options.lr,
        epochs=options.epochs,
        batch_size=options.batch_size,
        seed=seed,
        optimizer=OPTIMIZERS.parse(settings),
        warmup=_WARMUP,
        early_stopping=None,
        microbatch_tokens=16384,
        precision="fp32",
    )
    dev = {name: split(rows) for name, rows in task.dev.items()}
    found: list[float] = []

    def score(model: Any) -> dict[str, float]:
        values = dev_scores(model, dev, task.metrics, task.kind, _CPU, "fp32", 16384)
        found.append(values["score"])
        return values

    model = load_classifier(folder, task.num_labels, torch_seed(seed, "fine-tuning head"), _CPU)
    fine_tune(model, split(task.train), score, plan, task.kind, _CPU)
    return found[-1]


def theirs(folder: Path, task: TaskData, seed: int, options: argparse.Namespace) -> float:
    """As a tutorial writes it: nothing of ours but the rows and their order."""
    assert task.train is not None
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=task.num_labels)
    decayed = [each for each in model.parameters() if each.ndim > 1]
    rest = [each for each in model.parameters() if each.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr)
    count = len(task.train)
    steps = -(-count // options.batch_size) * options.epochs
    schedule = get_linear_schedule_with_warmup(optimizer, round(_WARMUP * steps), steps)

    def logits(rows: Any, chosen: list[int]) -> torch.Tensor:
        texts = [[column[row] for row in chosen] for column in (rows.texts, rows.pairs) if column is not None]
        inputs = tokenizer(*texts, padding=True, truncation=True, max_length=options.max_length, return_tensors="pt")
        return model(**inputs).logits

    model.train()
    for epoch in range(options.epochs):
        order = keyed_generator(seed, "fine-tuning order", epoch).permutation(count).tolist()
        for first in range(0, count, options.batch_size):
            chosen = order[first : first + options.batch_size]
            labels = torch.tensor([(task.train.labels or [])[row] for row in chosen])
            cross_entropy(logits(task.train, chosen), labels).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    metrics = {"accuracy": accuracy_score, "f1": f1_score, "mcc": matthews_corrcoef}
    values = []
    with torch.no_grad():
        for rows in task.dev.values():
            parts = [list(range(first, min(first + 64, len(rows)))) for first in range(0, len(rows), 64)]
            answers = torch.cat([logits(rows, part).argmax(1) for part in parts]).numpy()
            values += [metrics[name](rows.labels, answers) for name in task.metrics]
    return float(np.mean(values))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("--task", default="mrpc", choices=["cola", "sst2", "mrpc", "qnli", "rte", "mnli"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    options = parser.parse_args()
    if len(options.seeds) < 2:
        parser.error("--seeds: an interval needs at least two")
    task = load_task(validate(TextTask, {"name": options.task}, "--task"), options.data, None)
    scores: dict[str, list[float]] = {"ours": [], "theirs": []}
    seconds = dict.fromkeys(scores, 0.0)
    for seed in options.seeds:
        for name, side in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            scores[name].append(side(options.model, task, seed, options))
            seconds[name] += time.perf_counter() - start
    differences = np.subtract(scores["ours"], scores["theirs"])
    low, high = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    line = {
        "benchmark": "finetuning_scores",
        "task": options.task,
        "seeds": options.seeds,
        "scores": {name: [round(value, 4) for value in values] for name, values in scores.items()},
        "deviation": {name: round(float(np.std(values, ddof=1)), 4) for name, values in scores.items()},
        "difference": round(float(differences.mean()), 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
        "alike": bool(low <= 0 <= high),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
