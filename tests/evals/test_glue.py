"""Fine-tuning equals transformers' own models in a loop of plain PyTorch, and the protocol is what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import AutoModelForSequenceClassification

from commands.evaluate import run_eval
from data.keyed import keyed_generator
from evals.classifiers import encode, load_classifier, load_tokenizer, longest
from evals.finetuning import Plan, Split, fine_tune, predict
from flexbert_core.schema import ConfigError, RunError
from recipe.slots import OPTIMIZERS
from tests.helpers.exports import write_bert, write_export

CPU = torch.device("cpu")


def pairs(count: int, seed: int, words: int = 90) -> tuple[list[str], list[str], list[int]]:
    """Pairs of texts of 1 to 20 words; 1: the second begins with a word from the first half of the vocabulary."""
    generator = keyed_generator(seed, "pairs")
    texts = [
        " ".join(f"word{number}" for number in generator.integers(0, words, generator.integers(1, 21)))
        for _ in range(2 * count)
    ]
    labels = [int(int(text.split()[0][4:]) < words // 2) for text in texts[count:]]
    return texts[:count], texts[count:], labels


def plan(**changes: Any) -> Plan:
    given: dict[str, Any] = {
        "lr": 2e-3,
        "epochs": 2,
        "batch_size": 8,
        "seed": 3,
        "optimizer": OPTIMIZERS.parse({"name": "adamw", "weight_decay": 0.01}),
        "warmup": 0.1,
        "early_stopping": None,
        "microbatch_tokens": 10**6,
        "precision": "fp32",
    }
    return Plan(**{**given, **changes})


def splits(tokenizer: Any, count: int = 43) -> tuple[Split, Split]:
    train, dev = pairs(count, 1), pairs(40, 2)
    return tuple(Split(encode(tokenizer, texts, others, 64)[0], labels) for texts, others, labels in (train, dev))  # pyright: ignore


def copied_head(ours: Any, theirs: Any) -> None:
    """Give transformers' model the same fresh head."""
    head = ours.model.head
    with torch.no_grad():
        if hasattr(theirs, "bert"):
            theirs.bert.pooler.dense.weight.copy_(head.dense.weight)
            theirs.bert.pooler.dense.bias.copy_(head.dense.bias)
        theirs.classifier.weight.copy_(head.classifier.weight)
        theirs.classifier.bias.copy_(head.classifier.bias)


def plain_loop(model: Any, tokenizer: Any, count: int, plan: Plan) -> list[float]:
    """Mean losses of epochs: transformers' model on padded batches, the schedule written out, torch's AdamW."""
    texts, others, labels = pairs(count, 1)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.98), eps=1e-6)
    per_epoch = -(-count // plan.batch_size)
    steps, warmup, step, losses = per_epoch * plan.epochs, round(0.1 * per_epoch * plan.epochs), 0, []
    model.train()
    for epoch in range(plan.epochs):
        order = keyed_generator(plan.seed, "fine-tuning order", epoch).permutation(count)
        total = 0.0
        for first in range(0, count, plan.batch_size):
            chosen = order[first : first + plan.batch_size]
            batch = tokenizer(
                [texts[row] for row in chosen], [others[row] for row in chosen], padding=True, return_tensors="pt"
            )
            share = (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup)
            for group in optimizer.param_groups:
                group["lr"] = plan.lr * share
            loss = F.cross_entropy(model(**batch).logits, torch.tensor([labels[row] for row in chosen]))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() * len(chosen)
            step += 1
        losses.append(total / count)
    return losses


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_training_equals_transformers_in_a_plain_loop(tmp_path: Path, family: str) -> None:
    folder = write_bert(tmp_path / "m") if family == "bert" else write_export(tmp_path / "m")
    tokenizer = load_tokenizer(folder)
    train, dev = splits(tokenizer)
    ours = load_classifier(folder, 2, 5, CPU)
    assert ours.runtime == "flexbert"
    theirs: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, classifier_dropout=0.0)
    ours.model.head.dropout.probability = 0.0  # pyright: ignore
    copied_head(ours, theirs)
    batch = dev.rows[:9]
    ours.eval()
    theirs.eval()
    texts, others, _ = pairs(40, 2)
    inputs = tokenizer(texts[:9], others[:9], padding=True, return_tensors="pt")
    torch.testing.assert_close(ours.logits(batch, None), theirs(**inputs).logits, atol=2e-5, rtol=1e-4)
    scores: list[float] = []
    found, _ = fine_tune(
        ours,
        train,
        lambda model: {"score": scores.append(0.0) or float(len(scores))},  # the last epoch is the best
        plan(),
        "classes",
        CPU,
    )
    assert found["losses"] == pytest.approx(plain_loop(theirs, tokenizer, 43, plan()), rel=2e-4)
    theirs.eval()
    torch.testing.assert_close(
        predict(ours, batch, CPU, "fp32", 200), theirs(**inputs).logits.detach(), atol=2e-3, rtol=2e-2
    )


def test_microbatches_change_nothing(tmp_path: Path) -> None:
    """Nor what is dropped, in the encoder and in the head."""
    folder = write_bert(tmp_path / "m", dropout=0.2)
    train, _ = splits(load_tokenizer(folder), 20)
    losses = []
    for most_tokens in (10**6, 50, 1):
        model = load_classifier(folder, 2, 5, CPU)
        assert model.model.head.dropout.probability > 0
        found, _ = fine_tune(
            model, train, lambda _: {"score": 0.0}, plan(microbatch_tokens=most_tokens), "classes", CPU
        )
        losses.append(found["losses"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_dropout_is_keyed(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "m", dropout=0.2)
    train, _ = splits(load_tokenizer(folder), 20)
    losses = []
    for seed, noise in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(noise)
        model = load_classifier(folder, 2, 5, CPU)
        found, _ = fine_tune(model, train, lambda _: {"score": 0.0}, plan(seed=seed), "classes", CPU)
        losses.append(found["losses"])
    assert losses[0] == losses[1] != losses[2]


def test_the_best_epoch_is_kept_and_training_stops_early(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "m")
    train, _ = splits(load_tokenizer(folder), 16)
    model = load_classifier(folder, 2, 5, CPU)
    given, states = iter([0.3, 0.5, 0.4, 0.5, 0.9]), []

    def score(_: Any) -> dict[str, float]:
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"score": next(given)}

    found, weights = fine_tune(model, train, score, plan(epochs=5, early_stopping=2), "classes", CPU)
    assert (found["score"], found["epoch"], len(found["losses"])) == (0.5, 2, 4)
    assert all(torch.equal(weights[name], states[1][name]) for name in weights)


def test_a_diverging_run_says_so(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "m")
    train, _ = splits(load_tokenizer(folder), 16)
    with pytest.raises(RunError, match=r"the loss of epoch 1 is (nan|inf): lower lr \(1e\+30\)"):
        fine_tune(load_classifier(folder, 2, 5, CPU), train, lambda _: {"score": 0.0}, plan(lr=1e30), "classes", CPU)


def test_rows_that_are_too_long_are_cut_and_counted(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_bert(tmp_path / "m"))
    texts = ["word1 " * count for count in (1, 30, 80)]
    encoded, cut = encode(tokenizer, texts, None, 32)
    assert [len(row.input_ids) for row in encoded] == [3, 32, 32]
    assert cut == 1
    assert encoded[2].input_ids[-1] == tokenizer.sep_token_id
    assert longest(tmp_path / "m", tokenizer) == 64


def test_the_classifier_starts_from_what_the_folder_has(tmp_path: Path) -> None:
    """ModernBERT's head from the masked-token head; another seed draws only the last layer anew."""
    folder = write_export(tmp_path / "m")
    first, second = (load_classifier(folder, 3, seed, CPU).state_dict() for seed in (1, 2))
    differ = {name for name in first if not torch.equal(first[name], second[name])}
    assert differ == {"head.classifier.weight"}


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_bert(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"bert\.encoder\.layer\.1\.output\.dense\.weight: missing"):
        load_classifier(folder, 2, 1, CPU)
    with pytest.raises(RunError, match=r"bert\.encoder\.layer\.1\.output\.dense\.weight is not in its weights"):
        load_classifier(folder, 2, 1, CPU, runtime="transformers")


def write_tasks(folder: Path) -> None:
    """MNLI, RTE, STS-B and AX in GLUE's layout, small and learnable."""
    classes = ["entailment", "neutral", "contradiction"]
    for task, header, label in [
        ("MNLI", "index\tsentence1\tsentence2\tgold_label", lambda x: classes[x]),
        ("RTE", "index\tsentence1\tsentence2\tlabel", lambda x: "entailment" if x else "not_entailment"),
        ("STS-B", "index\tsentence1\tsentence2\tscore", lambda x: f"{5.0 * x}"),
    ]:
        (folder / task).mkdir(parents=True)
        names = ["train", "dev_matched", "dev_mismatched"] if task == "MNLI" else ["train", "dev"]
        for number, name in enumerate(names):
            rows = zip(*pairs(24, number), strict=True)
            lines = [f"{i}\t{a}\t{b}\t{label(x)}" for i, (a, b, x) in enumerate(rows)]
            (folder / task / f"{name}.tsv").write_text("\n".join([header, *lines]) + "\n")
    (folder / "AX").mkdir()
    (folder / "AX" / "diagnostic.tsv").write_text("index\tsentence1\tsentence2\n0\tword1\tword2\n")


def test_the_chain_the_grid_and_the_table(tmp_path: Path) -> None:
    """RTE and STS-B start from the best MNLI weights of their seed, and those wait for MNLI's whole grid."""
    write_tasks(tmp_path / "glue")
    folder = write_bert(tmp_path / "bert")
    arguments = [str(folder), f"data={tmp_path}/glue", "tasks=[rte,ax,stsb,mnli]", "seeds=[0,1]", "lr=[1e-3,3e-3]"]
    arguments += ["epochs=[1]", "weight_decay=[1e-5]", "batch_size=8"]
    assert run_eval("glue", arguments, tmp_path / "out", Console(quiet=True))
    node = json.loads(next((tmp_path / "out" / "glue").glob("bert-*/results.json")).read_text())
    cells = node["cells"]
    of = {task: sorted(name for name in cells if name.startswith(f"{task}/")) for task in ("mnli", "rte", "stsb", "ax")}
    assert [len(names) for names in of.values()] == [4 + 2, 4, 4, 2]
    means = {
        lr: sum(cells[f"mnli/lr{lr}-wd1e-05-epochs1-seed{seed}"]["score"] for seed in (0, 1))
        for lr in ("0.001", "0.003")
    }
    best = max(means, key=lambda lr: means[lr])
    starts = [f"mnli/start-lr{best}-wd1e-05-epochs1-seed{seed}" for seed in (0, 1)]
    assert [name for name in of["mnli"] if "/start-" in name] == starts
    for seed, start in enumerate(starts):  # trained again, to the bit
        again, first = cells[start], cells[start.replace("start-", "")]
        assert (again["score"], again["losses"]) == (first["score"], first["losses"])
        assert (
            next((tmp_path / "out/glue").glob(f"bert-*/files/ax-seed{seed}.tsv"))
            .read_text()
            .startswith("index\tprediction\n0\t")
        )
    order = [
        line
        for line in sorted(
            (tmp_path / "out/glue").glob("bert-*/cells/**/*.json"), key=lambda file: file.stat().st_mtime_ns
        )
    ]
    names = [json.loads(file.read_text())["cell"] for file in order]
    assert max(names.index(name) for name in of["mnli"]) < min(
        names.index(name) for name in [*of["rte"], *of["stsb"], *of["ax"]]
    )
    scores = node["scores"]
    assert scores["mnli"]["mean"] == pytest.approx(means[best] / 2)
    assert scores["mnli"]["seeds"] == 2
    assert "ax" not in scores  # it has no labels here
    assert scores["average"] == pytest.approx(sum(scores[task]["mean"] for task in ("mnli", "rte", "stsb")) / 3)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "always one answer" in table
    assert "| glue: stsb |" in table
    # STS-B's start is MNLI's: without it another result
    assert run_eval("glue", [*arguments[:2], "tasks=[rte]", *arguments[3:]], tmp_path / "alone", Console(quiet=True))
    alone = json.loads(next((tmp_path / "alone" / "glue").glob("bert-*/results.json")).read_text())["cells"]
    assert all(alone[name]["losses"] != cells[name]["losses"] for name in of["rte"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tasks=[ax]"], "tasks: ax: is scored with the model of mnli: add that task"),
        (["seeds=[1,1]"], r"seeds: a value stands there twice: \[1, 1\]"),
        (["tasks=[rte,rte]"], "tasks: rte stands there twice"),
        (["hub=nyu-mll/glue"], "give data .* or hub"),
        (["tasks=[rtee]"], r"'rtee' is no task of GLUE \(did you mean 'rte'\?\)"),
        (["lr=[-1]"], r"lr\[0\]"),
        (["lr=[1e-5,1.0000001e-5]"], r"lr: two values are alike in six digits: \[1e-05, 1\.0000001e-05\]"),
        (
            ["tasks=[mnli,{name: rte, starts_from: mnil}]"],
            r"tasks: rte: starts_from: mnil is none of the tasks, did you mean 'mnli'\?: add that task, or leave it out",
        ),
        (["tasks=[mnli,{name: ax, starts_from: mnli}]"], "tasks: ax: starts_from: is not trained, but scored with"),
        (
            ["tasks=[mnli,{name: ax, labels: [same, other]}]"],
            "tasks: ax: labels: there are 2, of mnli, .* 3: give the classes",
        ),
        (
            ["tasks=[rte]", "rows=1"],
            "tasks: rte: rows: the class .*entail.* is in none of the first 1 training rows of 24",
        ),
    ],
)
def test_wrong_protocols_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    write_tasks(tmp_path / "glue")
    folder = write_bert(tmp_path / "bert")
    with pytest.raises(ConfigError, match=message):
        run_eval("glue", [str(folder), f"data={tmp_path}/glue", *arguments], tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out" / "glue").exists()


def test_what_a_task_starts_from_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tasks(tmp_path / "glue")
    folder = write_bert(tmp_path / "bert")
    arguments = [str(folder), f"data={tmp_path}/glue", "seeds=[0]", "lr=[1e-3]", "epochs=[1]", "weight_decay=[0]"]

    def start(tasks: str) -> str:
        out = tmp_path / tasks
        assert run_eval("glue", [*arguments, f"tasks=[{tasks}]"], out, Console(quiet=True))
        cells = json.loads(next((out / "glue").glob("bert-*/results.json")).read_text())["cells"]
        return cells["rte/lr0.001-wd0-epochs1-seed0"]["starts_from"]

    said = "tasks: rte: starts from the model itself, not from the weights of mnli as the protocol has it"
    assert start("mnli,rte") == "the weights of mnli"
    assert said not in caplog.text
    assert start("rte") == "fresh weights"
    assert said in caplog.text


@pytest.mark.parametrize(
    ("name", "words"), [("train", "rte: has no labelled training rows"), ("dev", "rte: its dev set has no labels")]
)
def test_tasks_without_labels_are_refused(tmp_path: Path, name: str, words: str) -> None:
    write_tasks(tmp_path / "glue")
    (tmp_path / "glue" / "RTE" / f"{name}.tsv").write_text("sentence1\tsentence2\tlabel\nA\tB\t-1\n")
    with pytest.raises(ConfigError, match=words):
        run_eval("glue", [str(tmp_path), f"data={tmp_path}/glue", "tasks=[rte]"], tmp_path / "out", Console(quiet=True))
