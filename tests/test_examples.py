"""The parts in examples/, which docs/extending shows: each is used by its YAML name, and is held against its formula.

Model parts, schedule and optimizer come through `imports:`, data parts through the script that imports them.
"""

import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from data.preparation.config import load_prepare_config
from flexbert import FlexBertConfig, build
from flexbert.registry import SLOTS
from flexbert_core.schema import ConfigError
from recipe.config import load_run_config
from recipe.schedules import SCHEDULES
from recipe.slots import OPTIMIZERS
from tests.helpers.ranks import Ranks
from tests.helpers.runs import environment
from tests.helpers.tiny import ROW, ROWS, write_config

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
OWN = EXAMPLES / "own_parts.yaml"
# What each file's part is called in YAML, as one change of the smallest model.
MODEL_PARTS: dict[str, dict[str, Any]] = {
    "scale_norm": {"norm": {"name": "scale_norm", "eps": 1e-6}},
    "squareplus": {"mlp": {"name": "glu", "activation": "squareplus"}},
    "maxout": {"mlp": "maxout"},
    "mean_attention": {"attention": "mean"},
    "log_position": {"position": "log_buckets"},
    "rezero": {"block": {"name": "rezero", "start": 0.5}},
    "gated_embedding": {"embedding": "gated"},
    "cosine_head": {"head": {"name": "cosine", "scale": 4.0}},
    "focal_loss": {"loss": {"name": "focal", "gamma": 1.0}},
    "orthogonal_init": {"init": {"name": "orthogonal", "gain": 0.7}},
}
SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture(scope="module")
def own() -> Any:
    """The run file of all parts, loaded."""
    return load_run_config(OWN)


def model_of(part: str, tmp_path: Path) -> Any:
    """A model with one part from outside, through the `imports` of a run file."""
    node: Any = OmegaConf.load(OWN)
    node.imports = [str(EXAMPLES / f"{part}.py")]
    node.model = {**SMALL, **MODEL_PARTS[part]}
    node.optimizer, node.phases[0].schedule = "adamw", "constant"
    OmegaConf.save(node, tmp_path / "run.yaml")
    return build(load_run_config(tmp_path / "run.yaml").model, seed=1)


def batch(lengths: list[int]) -> tuple[Tensor, Tensor, int]:
    ids = torch.randint(96, (sum(lengths),), generator=torch.Generator().manual_seed(2))
    return ids, torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths)


def test_every_example_is_tested_and_shown() -> None:
    parts = {file.stem for file in EXAMPLES.glob("*.py")}
    # tests/callbacks/test_slots.py has the first, tests/evals/test_example.py the second, test_doors.py the others.
    elsewhere = {"weight_norm", "anisotropy"} | {
        "span_masking",
        "every_token",
        "mean_similarity",
        "centred_gradients",
        "csv_logger",
    }
    assert set(MODEL_PARTS) | {"power_schedule", "signum"} | elsewhere | DATA_PARTS | {"with_data_parts"} == parts
    pages = "".join(file.read_text() for file in (ROOT / "docs" / "extending").glob("*.md"))
    assert {part for part in parts if f'--8<-- "examples/{part}.py"' in pages} == parts
    imported = {Path(name).stem for name in OmegaConf.load(OWN).imports}
    assert imported == set(MODEL_PARTS) | {"power_schedule", "signum"}


@pytest.mark.parametrize("part", MODEL_PARTS)
def test_model_part_keeps_documents_apart_and_learns(part: str, tmp_path: Path) -> None:
    model = model_of(part, tmp_path)
    ids, cu_seqlens, longest = batch([5, 1, 9])
    logits = model(ids, cu_seqlens, longest).logits
    others = ids.clone()
    others[6:] = (others[6:] + 1) % 96
    assert torch.equal(model(others, cu_seqlens, longest).logits[:6], logits[:6])
    alone = model(ids[6:], torch.tensor([0, 9], dtype=torch.int32), 9).logits
    torch.testing.assert_close(alone, logits[6:], atol=1e-5, rtol=1e-5)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = model(ids, cu_seqlens, longest, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(each.grad is not None and each.grad.isfinite().all() for each in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_run_file_of_all_parts_keeps_to_its_schema() -> None:
    """Names from outside are no faults where a file has imports; options of our own parts still are."""
    schema = json.loads((ROOT / "configs/schema/run.json").read_text())
    node: Any = OmegaConf.to_container(OmegaConf.load(OWN))
    assert OWN.read_text().startswith("# yaml-language-server: $schema=../configs/schema/run.json\n")
    validator = jsonschema.Draft7Validator(schema)
    assert not list(validator.iter_errors(node))
    node["optimizer"] = {"name": "adamw", "weight_decy": 0.1}
    assert list(validator.iter_errors(node))
    node["optimizer"] = "adamw"
    node["model"]["initial_layers"]["mlp"] = {"name": "mlp", "activation": 3}
    assert list(validator.iter_errors(node))


def test_scale_norm(own: Any) -> None:
    norm = SLOTS["norm"].build(own.model.norm, hidden_size=3)
    found = norm(torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]]))
    expected = torch.tensor([[0.6 * math.sqrt(3), 0.8 * math.sqrt(3), 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("x", "y"), [(0.0, 1.0), (1.5, 2.0), (-1.5, 0.5)])
def test_squareplus(own: Any, x: float, y: float) -> None:
    assert SLOTS["activation"].entries["squareplus"](torch.tensor(x)).item() == y


def test_maxout(own: Any) -> None:
    mlp = SLOTS["mlp"].build(own.model.mlp, hidden_size=4, intermediate_size=6).eval()
    states = torch.randn(5, 4)
    first = F.linear(states, mlp.Wi.weight[:6], mlp.Wi.bias[:6])
    second = F.linear(states, mlp.Wi.weight[6:], mlp.Wi.bias[6:])
    torch.testing.assert_close(
        mlp(states), F.linear(torch.where(first > second, first, second), mlp.Wo.weight, mlp.Wo.bias)
    )


def test_mean_attention(own: Any) -> None:
    from flexbert.kernels.plan import AttentionPlan
    from flexbert.positions import Positions

    attention = SLOTS["attention"].build(
        own.model.initial_layers.attention, hidden_size=4, num_attention_heads=2, layer_index=0
    )
    states = torch.randn(6, 4)
    plan = AttentionPlan(torch.tensor([0, 2, 2, 6], dtype=torch.int32), 4, 6)
    values = states @ attention.Wv.weight.T
    means = torch.stack([values[:2].mean(0)] * 2 + [values[2:].mean(0)] * 4)
    torch.testing.assert_close(attention(states, plan, Positions()), means @ attention.Wo.weight.T)


def test_log_position(own: Any) -> None:
    position = SLOTS["position"].build(own.model.position, model=own.model)
    places = torch.tensor([0, 1, 2, 3, 4, 7, 8, 511])
    buckets = [0, 1, 2, 2, 3, 3, 4, 9]
    torch.testing.assert_close(position.embed(places, 512), position.table.weight[buckets])


def test_rezero_starts_as_nothing(own: Any) -> None:
    config = FlexBertConfig.from_dict({**SMALL, "block": "rezero", "embedding": "tokens"})
    encoder = build(config, "encoder")
    ids, cu_seqlens, longest = batch([3, 4])
    expected = encoder.final_norm(encoder.embedding(ids))
    torch.testing.assert_close(encoder(ids, cu_seqlens, longest), expected)


def test_gated_embedding(own: Any) -> None:
    embedding = SLOTS["embedding"].build(own.model.embedding, model=own.model)
    embedding.norm = torch.nn.Identity()
    with torch.no_grad():
        embedding.gates.weight[3] = math.log(3)  # sigmoid: 3/4
    torch.testing.assert_close(embedding(torch.tensor([3])), 1.5 * embedding.tokens.weight[3:4])


def test_cosine_head(own: Any) -> None:
    head = SLOTS["head"].build(own.model.head, model=own.model)
    lengths = head(torch.randn(7, 128)).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((7,), 16.0))


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_focal_loss(own: Any, gamma: float) -> None:
    from flexbert.losses import TokenScores

    registry = SLOTS["loss"]
    loss = registry.build(registry.parse({"name": "focal", "gamma": gamma}))
    states, weight, bias = torch.randn(5, 8), torch.randn(11, 8), torch.randn(11)
    targets = torch.tensor([0, 3, 10, 3, 7])
    scores = TokenScores.empty(targets)
    probabilities = (states @ weight.T + bias).softmax(1).tolist()
    chosen = [row[target] for row, target in zip(probabilities, targets.tolist(), strict=True)]
    expected = sum(-((1 - p) ** gamma) * math.log(p) for p in chosen)
    assert loss(states, weight, bias, targets, scores).item() == pytest.approx(expected, rel=1e-5)
    assert scores.losses.tolist() == pytest.approx([-math.log(p) for p in chosen], rel=1e-5)
    assert scores.hits.tolist() == [p == max(row) for p, row in zip(chosen, probabilities, strict=True)]
    assert loss(states[:0], weight, bias, targets[:0]).item() == 0


def test_orthogonal_init(tmp_path: Path) -> None:
    model = model_of("orthogonal_init", tmp_path)
    weight = model.encoder.layers[1].attn.Wo.weight
    torch.testing.assert_close(weight @ weight.T, 0.49 * torch.eye(32), atol=1e-6, rtol=0)
    assert torch.equal(weight, model_of("orthogonal_init", tmp_path).encoder.layers[1].attn.Wo.weight)


@pytest.mark.parametrize(("progress", "factor"), [(0.0, 1.0), (0.5, 0.25), (0.9, 0.01)])
def test_power_schedule(own: Any, progress: float, factor: float) -> None:
    assert SCHEDULES.build(own.phases[0].schedule)(progress, 0.1) == pytest.approx(factor)


def test_signum_is_its_formula(own: Any) -> None:
    model = torch.nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(-1.0)
    optimizer = OPTIMIZERS.build(own.optimizer, model=model, lr=0.5)
    weight, bias, means = 2.0, -1.0, [0.0, 0.0]
    for gradients in ((1.0, -2.0), (-0.05, 0.0), (-3.0, 1.0)):
        model.weight.grad, model.bias.grad = torch.full((1, 1), gradients[0]), torch.full((1,), gradients[1])
        optimizer.step()
        means = [0.9 * m + 0.1 * g for m, g in zip(means, gradients, strict=True)]
        signs = [math.copysign(1, m) for m in means]
        weight, bias = weight * (1 - 0.5 * 0.1) - 0.5 * signs[0], bias - 0.5 * signs[1]  # a bias does not decay
        assert (model.weight.item(), model.bias.item()) == pytest.approx((weight, bias))


@pytest.mark.slow
def test_all_parts_train_and_resume_on_one_and_two_processes(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    own: Any = OmegaConf.load(OWN)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}

    def run_file(name: str) -> Path:
        write_config(tmp_path / name, tiny_data, 6)
        node: Any = OmegaConf.load(tmp_path / name / "train.yaml")
        node.imports = [str(EXAMPLES / file) for file in own.imports]
        node.model = {**own.model, **sizes, "max_position_embeddings": 2 * ROW}
        node.optimizer, node.phases[0].schedule, node.phases[0].lr = own.optimizer, own.phases[0].schedule, 1e-3
        OmegaConf.save(node, tmp_path / name / "train.yaml")
        return tmp_path / name / "train.yaml"

    def weights(name: str) -> dict[str, Tensor]:
        return load_file(tmp_path / name / "run/checkpoints" / f"tokens-{6 * ROWS * ROW}" / "model.safetensors")

    ranks.train(1, str(run_file("straight")))
    lines = [json.loads(line) for line in (tmp_path / "straight/run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6
    assert all(math.isfinite(loss) for loss in losses)
    for name, processes in (("one", 1), ("two", 2)):
        file = run_file(name)
        ranks.train(processes, str(file))
        # As a run is that was killed after its third checkpoint.
        for step in (4, 5, 6):
            shutil.rmtree(tmp_path / name / "run/checkpoints" / f"tokens-{step * ROWS * ROW}")
        (tmp_path / name / "run/summary.json").unlink()
        ranks.train(processes, str(file))
    straight, one, two = weights("straight"), weights("one"), weights("two")
    assert all(torch.equal(one[key], value) for key, value in straight.items())
    assert straight.keys() == two.keys()
    # A step of Lion has one size, so where two processes round another way, single entries differ by whole steps.
    moved = sum(int(((two[key] - value).abs() > 1e-5).sum()) for key, value in straight.items())
    assert moved < 0.01 * sum(value.numel() for value in straight.values())


DATA_PARTS = {"csv_source", "letters_filter", "serial_executor", "word_tokenizer"}


def prepare(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.with_data_parts", "prepare", str(file), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_data_parts_prepare_the_same_dataset_here_and_in_workers(tmp_path: Path) -> None:
    """The expected documents are counted with the csv module and plain Python."""
    (tmp_path / "articles").mkdir()
    words = ["stream", "shard", "row", "token"]
    rows = [[" ".join(words[: 1 + number % 4] * 9) + f" {number}", f"t{number}"] for number in range(60)]
    rows += [["1234567890 " * 5, "digits"]]
    for number in range(3):
        with (tmp_path / "articles" / f"{number}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["body", "title"], *rows[number::3]])
    config = tmp_path / "own.yaml"
    source = f"paths=[{tmp_path / 'articles'}]"
    config.write_text((EXAMPLES / "own_data.yaml").read_text())
    for name, executor in (("serial", "serial"), ("workers", "{name: local, workers: 2}")):
        output = f"output={tmp_path / name}"
        done = prepare(
            config, f"streams.articles.source.{source}", output, f"executor={executor}", "tokenizer.vocab_size=128"
        )
        assert done.returncode == 0, done.stderr
    manifests = [
        json.loads((tmp_path / "serial/articles" / split / "stream.json").read_text())
        for split in ("train", "validation")
    ]
    assert sum(manifest["documents"] for manifest in manifests) == 60
    assert manifests[0]["filtered"] == {"letters": 1}
    # Words and the number, [UNK] where a number is too rare for the vocabulary: a token for each.
    assert sum(manifest["tokens"] for manifest in manifests) == sum(len(text.split()) for text, _ in rows[:60])
    found = sorted(file for file in (tmp_path / "serial").rglob("*") if file.is_file() and ".work" not in file.parts)
    files = [file.relative_to(tmp_path / "serial") for file in found]
    assert len(files) > 6
    assert all(
        (tmp_path / "serial" / file).read_bytes() == (tmp_path / "workers" / file).read_bytes() for file in files
    )
    missing = prepare(config, "streams.articles.source.paths=[nowhere]", f"output={tmp_path / 'none'}")
    assert missing.returncode == 2
    assert "nowhere" in missing.stderr
    assert len(missing.stderr.strip().splitlines()) == 1


def test_data_parts_have_no_names_without_their_script() -> None:
    with pytest.raises(ConfigError, match="unknown"):
        load_prepare_config(EXAMPLES / "own_data.yaml")
