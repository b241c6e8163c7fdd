"""Loss and gradient of a global batch: exactly the mean over its masked tokens, however it is split.

The reference is one backward over the whole global batch in this process, through the logits and torch's own cross
entropy. A run's gradient of its first step is in the checkpoint after it: StableAdamW's mean of gradients begins with it.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from data.feed.loader import build_loader
from data.keyed import torch_seed
from flexbert import build
from flexbert.dropout import TokenKeys, keyed_dropout
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from tests.helpers.ranks import Ranks
from tests.helpers.tiny import ROW, ROWS, write_config

SEED = 5
# The largest difference of an entry over the largest entry of its tensor; the worst measured is 6e-7.
TOLERANCE = 3e-6
DROPOUT = {
    "embedding": {"name": "tokens", "dropout": 0.1},
    "attention": {"out_dropout": 0.1},
    "mlp": {"name": "glu", "inner_dropout": 0.1, "out_dropout": 0.1},
}


def reference(config_file: Path) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the first global batch, by parameter."""
    config = load_run_config(config_file)
    batch = next(iter(build_loader(PhasePlan(config).loader_config(config), 0, 1)))
    model = build(config.model, seed=torch_seed(config.seed, "init"))
    keys = TokenKeys(torch_seed(config.seed, "dropout", 0), 0, batch["row_bounds"], len(batch["input_ids"]))
    with keyed_dropout(keys):
        logits = model(batch["input_ids"], batch["cu_seqlens"], batch["max_seqlen"]).logits
    assert logits is not None
    loss = F.cross_entropy(logits, batch["labels"], ignore_index=-100)
    loss.backward()
    return loss.item(), {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def first_step(folder: Path) -> tuple[float, dict[str, Tensor]]:
    """The same, of a run."""
    line = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
    states = load_file(folder / "run" / "checkpoints" / f"tokens-{ROWS * ROW}" / "optimizer.safetensors")
    ending = "/exp_avg"
    return line["loss"], {
        name.removeprefix("state/").removesuffix(ending): tensor
        for name, tensor in states.items()
        if name.endswith(ending)
    }


def masked_counts(config_file: Path, world_size: int) -> list[list[int]]:
    """Masked tokens of each row of the first global batch, by rank."""
    config = load_run_config(config_file)
    counts = []
    for rank in range(world_size):
        batch = next(iter(build_loader(PhasePlan(config).loader_config(config), rank, world_size)))
        assert set(batch["sequences"]) == {1}
        bounds = batch["cu_seqlens"].tolist()
        counts.append([int((batch["labels"][a:b] != -100).sum()) for a, b in itertools.pairwise(bounds)])
    return counts


@pytest.fixture(scope="module")
def expected(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[float, dict[str, Tensor]]:
    file = write_config(tmp_path_factory.mktemp("expected"), tiny_data, 1, seed=SEED)
    by_rank = masked_counts(file, 4)
    rows = sorted(count for rank in by_rank for count in rank)
    assert any(not any(rank) for rank in by_rank)  # a rank without masked tokens
    assert rows[0] == 0
    assert 0 < rows[ROWS // 2] < rows[-1] / 3  # and very different rows
    return reference(file)


def check(
    found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]], scale: float = 1.0
) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        error = (found[1][name] - scale * gradient).abs().max() / (scale * gradient).abs().max()
        assert error < TOLERANCE, name


@pytest.mark.parametrize(
    ("world_size", "microbatch", "parallelism"),
    [
        pytest.param(1, 1, "ddp", marks=pytest.mark.slow),
        (1, 2, "ddp"),
        pytest.param(1, None, "ddp", marks=pytest.mark.slow),
        (1, "auto", "ddp"),
        pytest.param(2, 1, "ddp", marks=pytest.mark.slow),
        (2, 3, "ddp"),  # the second microbatch is smaller
        pytest.param(2, "auto", "ddp", marks=pytest.mark.slow),
        pytest.param(4, 1, "ddp", marks=pytest.mark.slow),
        pytest.param(4, 2, "ddp", marks=pytest.mark.slow),
        (2, 1, "fsdp2"),
        pytest.param(4, 1, {"name": "fsdp2", "replicate": 2}, marks=pytest.mark.slow),
        pytest.param(2, 1, {"name": "fsdp2", "reshard_after_forward": False}, marks=pytest.mark.slow),
        pytest.param(1, 2, "fsdp2", marks=pytest.mark.slow),
        pytest.param(2, 3, "fsdp2", marks=pytest.mark.slow),
        pytest.param(4, 1, "fsdp2", marks=pytest.mark.slow),
        pytest.param(4, None, "fsdp2", marks=pytest.mark.slow),
    ],
)
def test_the_split_changes_only_rounding(
    ranks: Ranks, tiny_data: Path, tmp_path: Path, expected: Any, world_size: int, microbatch: Any, parallelism: Any
) -> None:
    options = {"log_interval": 1, "microbatch_size": microbatch, "parallelism": parallelism}
    file = write_config(tmp_path, tiny_data, 1, seed=SEED, trainer=options)
    text = ranks.train(world_size, str(file))
    assert (f"auto: up to {ROWS // world_size} rows of {ROW} at a time" in text) == (microbatch == "auto")
    check(first_step(tmp_path), expected)


@pytest.fixture(scope="module")
def expected_with_dropout(
    tiny_data: Path, tmp_path_factory: pytest.TempPathFactory, expected: tuple[float, dict[str, Tensor]]
) -> tuple[float, dict[str, Tensor]]:
    file = write_config(tmp_path_factory.mktemp("dropout"), tiny_data, 1, seed=SEED, model=DROPOUT)
    with_dropout = reference(file)
    assert with_dropout[0] != pytest.approx(expected[0], rel=1e-4)
    return with_dropout


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        pytest.param(1, {}, marks=pytest.mark.slow),
        pytest.param(1, {"microbatch_size": 3}, marks=pytest.mark.slow),
        (1, {"microbatch_size": 2, "activation_checkpointing": 1}),
        (2, {"microbatch_size": 3, "activation_checkpointing": 2}),
        pytest.param(
            2, {"microbatch_size": 1, "activation_checkpointing": 1, "parallelism": "fsdp2"}, marks=pytest.mark.slow
        ),
        pytest.param(4, {"microbatch_size": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_dropout_does_not_depend_on_the_split(
    ranks: Ranks,
    tiny_data: Path,
    tmp_path: Path,
    expected_with_dropout: Any,
    world_size: int,
    options: dict[str, Any],
) -> None:
    file = write_config(tmp_path, tiny_data, 1, seed=SEED, model=DROPOUT, trainer={"log_interval": 1, **options})
    ranks.train(world_size, str(file))
    check(first_step(tmp_path), expected_with_dropout)


@pytest.mark.parametrize(("world_size", "parallelism"), [(1, "ddp"), (2, "fsdp2")])
def test_clipping_is_to_the_norm_of_the_global_gradient(
    ranks: Ranks, tiny_data: Path, tmp_path: Path, expected: Any, world_size: int, parallelism: str
) -> None:
    norm = torch.stack([gradient.square().sum() for gradient in expected[1].values()]).sum().sqrt().item()
    options = {"log_interval": 1, "gradient_clip_norm": norm / 8, "parallelism": parallelism}
    ranks.train(world_size, str(write_config(tmp_path, tiny_data, 1, seed=SEED, trainer=options)))
    check(first_step(tmp_path), expected, scale=1 / 8)


@pytest.mark.parametrize(
    ("world_size", "parallelism"),
    [(2, "ddp"), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, "ddp"), (2, "fsdp2")))],
)
def test_a_global_batch_without_masked_tokens_has_no_loss_and_gradient_zero(
    ranks: Ranks, tiny_data: Path, tmp_path: Path, world_size: int, parallelism: str
) -> None:
    options = {"log_interval": 1, "microbatch_size": 2, "parallelism": parallelism}
    only = {"name": "all", "tokens": 2 * ROWS * ROW, "max_seq_len": ROW, "global_batch_size": ROWS, "lr": 1e-2}
    phases = [{**only, "streams": {"empty": {}}}]  # an evaluation looks at all streams, and must find some
    file = write_config(tmp_path, tiny_data, 2, "full", "empty", trainer=options, phases=phases)
    assert not any(any(rank) for rank in masked_counts(file, world_size))
    # A run of nothing else ends with an error behind its steps.
    codes, said = ranks.run(world_size, "train", str(file))
    assert codes == [1] * world_size
    assert "none of the 2 steps had a token to predict" in said
    loss, gradients = first_step(tmp_path)
    assert loss is None
    assert len(gradients) > 10
    assert not any(gradient.any() for gradient in gradients.values())
