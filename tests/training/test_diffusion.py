"""`diffusion`: its loss and gradients are the formula's however a step is split, and what is measured is the bound."""

import json
import math
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import main
from data.feed.held_out import HeldOutRows
from data.feed.loader import build_loader
from data.keyed import torch_seed
from data.store.shards import open_stream
from flexbert import build
from flexbert_core.schema import ConfigError
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from recipe.slots import OBJECTIVES
from tests.helpers.process import COUNTING
from tests.helpers.ranks import Ranks
from tests.helpers.runs import ROOT
from tests.helpers.tiny import ROW, ROWS, check_same, write_config

STEPS = 6
KEPT = ("model.safetensors", "optimizer.safetensors")
SHAPE = {"max_seq_len": ROW, "global_batch_size": ROWS, "lr": 1e-2}
TOKENS = 3 * ROWS * ROW
PHASES: list[dict[str, Any]] = [
    {"name": "masked", "tokens": TOKENS, **SHAPE, "objective": "mlm"},
    {"name": "diffused", "tokens": TOKENS, "objective": "diffusion"},
]
HELD_OUT = {"evaluations": [{"name": "held_out", "masking": "diffusion"}]}


def write(folder: Path, data: Path, **changes: Any) -> Path:
    return write_config(folder, data, STEPS, "full", "sparse", **{"phases": PHASES, **HELD_OUT, **changes})


@pytest.fixture(scope="module")
def straight(ranks: Ranks, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    ranks.train(1, str(write(folder, tiny_data)))
    return folder


def reference(model: Any, batch: Any) -> tuple[Tensor, int]:
    """Row by row and document by document, over all logits: the sum, and the tokens that could have been masked."""
    total, tokens = torch.zeros(()), 0
    bounds = batch["cu_seqlens"].tolist()
    for row, (first, last) in enumerate(pairwise(batch["row_bounds"].tolist())):
        for begin, end in pairwise([bound for bound in bounds if first <= bound <= last]):
            ids, labels = batch["input_ids"][begin:end], batch["labels"][begin:end]
            logits = model(ids, torch.tensor([0, end - begin], dtype=torch.int32), end - begin).logits
            for scores, label in zip(logits, labels, strict=True):
                if label >= 0:
                    total = total - scores.log_softmax(0)[label] / float(batch["row_rates"][row])
            tokens += int(((labels >= 0) | (ids >= 5)).sum())  # 0 to 4 are special
    return total, tokens


@pytest.mark.parametrize("streams", [("full", "sparse"), ("empty", "sparse")])
def test_loss_and_gradients_are_the_formula(tiny_data: Path, tmp_path: Path, streams: tuple[str, ...]) -> None:
    """Also of rows without a token to mask."""
    config = load_run_config(write_config(tmp_path, tiny_data, 1, *streams, objective="diffusion"))
    plan = PhasePlan(config)
    objective = OBJECTIVES.build(config.objective, plan=plan)
    model = build(config.model, seed=1)
    batch = next(iter(build_loader(plan.loader_config(config))))
    assert (batch["input_ids"][batch["labels"] >= 0] == 4).all(), "all become [MASK]"
    assert len(set(batch["row_rates"].tolist())) == ROWS
    loss = objective.loss(model, batch)
    loss.sum.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    expected, tokens = reference(model, batch)
    assert loss.count == objective.count(batch) == tokens
    torch.testing.assert_close(loss.sum, expected, rtol=1e-5, atol=1e-4)
    expected.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5 * max(scale, 1), rtol=1e-4)


def test_an_empty_batch_one_token_and_a_long_document(tiny_data: Path, tmp_path: Path) -> None:
    config = load_run_config(write_config(tmp_path, tiny_data, 1, objective="diffusion"))
    objective = OBJECTIVES.build(config.objective, plan=PhasePlan(config))
    model = build(config.model, seed=1)
    for lengths, rate in (([], 1.0), ([1], 0.001), ([1], 1.0), ([2 * ROW], 0.25)):
        ids = torch.full((sum(lengths),), 9)
        labels = (
            torch.where(torch.arange(len(ids)) % 4 == 0, ids, -100) if rate != 0.001 else torch.full_like(ids, -100)
        )
        bounds = torch.tensor([0, *lengths], dtype=torch.int32)
        batch = {
            "input_ids": torch.where(labels >= 0, 4, ids),
            "labels": labels,
            "cu_seqlens": bounds,
            "max_seqlen": sum(lengths),
            "masked": int((labels >= 0).sum()),
            "row_bounds": bounds,
            "row_rates": torch.full((len(lengths),), rate),
            "selectable": lengths,
        }
        loss = objective.loss(model, batch)
        expected, tokens = reference(model, batch)
        assert loss.count == tokens == sum(lengths)
        torch.testing.assert_close(loss.sum, expected, rtol=1e-5, atol=1e-5)
        loss.sum.backward()


@pytest.mark.parametrize(
    ("processes", "trainer"),
    [
        pytest.param(2, {"microbatch_size": 3}, marks=pytest.mark.slow),
        pytest.param(1, {"microbatch_size": 1}, marks=pytest.mark.slow),
        pytest.param(2, {"parallelism": "fsdp2", "microbatch_size": 1}, marks=pytest.mark.slow),
        pytest.param(1, {"compile": True}, marks=pytest.mark.slow),
        pytest.param(1, {"microbatch_size": "auto", "activation_checkpointing": 1}, marks=pytest.mark.slow),
    ],
)
def test_the_split_changes_only_rounding(
    ranks: Ranks, tiny_data: Path, straight: Path, tmp_path: Path, processes: int, trainer: dict[str, Any]
) -> None:
    """Compiled: as it was traced, which takes no compiler; test_compiled.py has one."""
    file = write(tmp_path, tiny_data, trainer={"log_interval": 1, **trainer}, imports=[COUNTING])
    ranks.train(processes, str(file), extra={"COUNTS": str(tmp_path)})
    check_same(tmp_path, straight)


def files(folder: Path) -> dict[str, bytes]:
    run = folder / "run"
    found = [run / "checkpoints" / f"tokens-{2 * TOKENS}" / name for name in KEPT]
    found += sorted((run / "exports").glob("*/model.safetensors"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


@pytest.mark.slow
@pytest.mark.parametrize("event", ["batch_end", "after_backward"])
def test_killed_in_each_phase_and_on_the_border(
    ranks: Ranks, tiny_data: Path, straight: Path, tmp_path: Path, event: str
) -> None:
    kills = [2, 3, 4, 6]
    file = write(
        tmp_path,
        tiny_data,
        imports=[str(ROOT / "tests" / "helpers" / "killer.py")],
        callbacks=[{"name": "killer", "steps": kills, "event": event}],
    )
    for _ in kills:
        assert ranks.run(1, "train", str(file))[0] == [-signal.SIGKILL]
    ranks.train(1, str(file))
    assert files(tmp_path) == files(straight)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_the_held_out_bound_is_the_weighed_sum(straight: Path) -> None:
    """Beside it the plain loss of the same masked tokens; the held-out loss of `evaluation` stays what it was."""
    line = next(line for line in reversed(lines(straight)) if "evaluations" in line)
    scores = line["evaluations"]["held_out"]
    config = load_run_config(straight / "train.yaml")
    model = build(config.model)
    weights = straight / "run" / "checkpoints" / f"tokens-{2 * TOKENS}" / KEPT[0]
    model.load_state_dict(load_file(weights), strict=False)  # a tied decoder has one name there
    weighed, tokens, plain, masked = 0.0, 0, 0.0, 0
    for name in ("full", "sparse"):
        stream = open_stream(f"{config.data.streams[name].path}/validation")
        seed = torch_seed(config.seed, "validation")
        (entry,) = config.evaluations
        for batch in HeldOutRows(stream, ROW, None, seed).batches(16, entry.masking, Path, 0, 1):
            total, count = reference(model.eval(), batch)
            weighed, tokens = weighed + total.item(), tokens + count
            found = model(batch["input_ids"], batch["cu_seqlens"], batch["max_seqlen"]).logits
            plain += F.cross_entropy(found, batch["labels"], ignore_index=-100, reduction="sum").item()
            masked += batch["masked"]
    assert scores["nll_bound"] == pytest.approx(weighed / tokens, rel=1e-5)
    assert (scores["loss"], scores["masked_tokens"]) == (pytest.approx(plain / masked, rel=1e-5), masked)
    assert "nll_bound" not in line["validation"]


def test_the_bound_of_a_model_that_knows_nothing_is_the_entropy_of_a_guess(tiny_data: Path, tmp_path: Path) -> None:
    """All logits alike: ln V a token, whatever is masked; so is the training loss, on average."""
    config = load_run_config(write_config(tmp_path, tiny_data, 40, "full", objective="diffusion"))
    plan = PhasePlan(config)
    objective = OBJECTIVES.build(config.objective, plan=plan)
    model = build(config.model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    sums = [(loss.sum.item(), loss.count) for loss in (objective.loss(model, batch) for batch in build_loader(plan.loader_config(config)))]  # fmt: skip
    means = torch.tensor([total / count for total, count in sums])
    assert abs(means.mean() - math.log(64)) < 6 * means.std() / len(means) ** 0.5


def test_a_step_is_shown_with_its_rates(straight: Path) -> None:
    config = load_run_config(straight / "train.yaml")
    batch = list(build_loader(PhasePlan(config).loader_config(config)))[4]
    arguments = ["inspect", str(straight / "run"), "--step", "5", "--rows", "0"]
    plain, as_json = (CliRunner().invoke(main.app, [*arguments, *more]).output for more in ([], ["--json"]))
    pieces = [json.loads(line) for line in as_json.splitlines()]
    assert [piece["rate"] for piece in pieces] == pytest.approx(batch["row_rates"].tolist(), abs=1e-6)
    for piece, (begin, end) in zip(pieces, pairwise(batch["cu_seqlens"].tolist()), strict=True):
        assert piece["labels"] == batch["labels"][begin + 1 : end - 1].tolist()
        assert f"rate {piece['rate']:.3f}" in plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "diffusion", "masking": {"rate": 0.2}, "phases": [{**PHASES[0], "objective": None}]},
         "masking: the objectives of all phases have targets of their own: leave it out"),
        ({"phases": [PHASES[0], {**PHASES[1], "masking": {"rate": 0.2}}]},
         "phases[1].masking: objective 'diffusion' has targets of its own (diffusion): leave it out"),
        ({"imports": [str(ROOT / "examples" / "focal_loss.py")], "model": {"loss": "focal"}},
         "phases[1].objective: diffusion: model.loss: 'focal' does not say that it can weigh tokens: use cross_entropy, or take `shares` in it and give it `takes_shares = True`"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(
    tiny_data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load_run_config(write(tmp_path, tiny_data, **changes))
    assert str(error.value) == f"{tmp_path / 'train.yaml'}: {message}"
