"""Runs of `clm`, and of `clm` before `mlm`: its loss, its split, kills in each phase and on their border."""

import json
import math
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from data.feed.loader import build_loader
from flexbert import build
from flexbert.accounting import batch_flops
from flexbert_core.schema import ConfigError
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from recipe.slots import OBJECTIVES
from tests.helpers.process import COUNTING
from tests.helpers.ranks import Ranks
from tests.helpers.runs import ROOT, environment
from tests.helpers.tiny import ROW, ROWS, check_same, write_config

STEPS = 6
KEPT = ("model.safetensors", "optimizer.safetensors")
SHAPE = {"max_seq_len": ROW, "global_batch_size": ROWS, "lr": 1e-2}
TOKENS = 3 * ROWS * ROW
PHASES: list[dict[str, Any]] = [
    {"name": "causal", "tokens": TOKENS, **SHAPE, "objective": "clm"},
    {"name": "masked", "tokens": TOKENS, "objective": "mlm", "masking": {"rate": 0.4}},
]
DROPOUT = {"attention": {"out_dropout": 0.1}}


def two_phases(folder: Path, data: Path, **changes: Any) -> Path:
    return write_config(folder, data, STEPS, "full", "sparse", **{"phases": PHASES, "model": DROPOUT, **changes})


def files(folder: Path) -> dict[str, bytes]:
    """Of the last checkpoint, and of both phases' exports."""
    last = folder / "run" / "checkpoints" / f"tokens-{STEPS * ROWS * ROW}"
    found = [last / name for name in KEPT] + sorted((folder / "run" / "exports").glob("*/model.safetensors"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


@pytest.fixture(scope="module")
def straight(ranks: Ranks, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    ranks.train(1, str(two_phases(folder, tiny_data)))
    return folder


def test_the_loss_is_that_of_each_document_alone(tiny_data: Path, tmp_path: Path) -> None:
    """The reference: document by document, all logits, torch's cross entropy of the tokens one place on."""
    config = load_run_config(write_config(tmp_path, tiny_data, 1, "full", "sparse", objective="clm"))
    plan = PhasePlan(config)
    objective = OBJECTIVES.build(config.objective, plan=plan)
    model = build(config.model, seed=1)
    batch = next(iter(build_loader(plan.loader_config(config))))
    loss = objective.loss(model, batch)
    loss.sum.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    sums, scores, count = torch.zeros(()), list[Tensor](), 0
    for begin, end in pairwise(batch["cu_seqlens"].tolist()):
        ids = batch["input_ids"][begin:end]
        states = model.encoder(ids, torch.tensor([0, end - begin], dtype=torch.int32), end - begin, causal=True)
        weight, bias = model.head.decoder(model.encoder.token_table)
        each = F.cross_entropy(F.linear(model.head(states), weight, bias)[:-1], ids[1:], reduction="none")
        sums, count = sums + each.sum(), count + len(ids) - 1
        scores.append(each)
    assert loss.count == objective.count(batch) == count
    torch.testing.assert_close(loss.sum, sums)
    torch.testing.assert_close(loss.scores.losses, torch.cat(scores), atol=1e-5, rtol=1e-5)
    sums.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("event", ["after_backward", "batch_end"])
def test_killed_in_each_phase_and_on_the_border(
    ranks: Ranks, tiny_data: Path, straight: Path, tmp_path: Path, event: str
) -> None:
    """On the border: in the last step of the first phase, and in the first of the second."""
    kills = [2, 3, 4, 6]
    file = two_phases(
        tmp_path,
        tiny_data,
        checkpoint={"interval": 2 * ROWS * ROW},
        imports=[str(ROOT / "tests" / "helpers" / "killer.py")],
        callbacks=[{"name": "killer", "steps": kills, "event": event}],
    )
    for _ in kills:
        assert ranks.run(1, "train", str(file))[0] == [-signal.SIGKILL]
    ranks.train(1, str(file))
    assert files(tmp_path) == files(straight)


@pytest.mark.parametrize(
    ("processes", "trainer"),
    [
        (2, {"microbatch_size": 3}),
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
    file = two_phases(tmp_path, tiny_data, trainer={"log_interval": 1, **trainer}, imports=[COUNTING])
    ranks.train(processes, str(file), extra={"COUNTS": str(tmp_path)})
    check_same(tmp_path, straight)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_weights_go_on_into_the_next_phase(ranks: Ranks, tiny_data: Path, straight: Path, tmp_path: Path) -> None:
    """The second phase is the branch of `mlm` that starts from the first one's checkpoint."""
    origin = str(straight / "run" / "checkpoints" / f"tokens-{TOKENS}")
    second = {**SHAPE, **PHASES[1]}
    ranks.train(1, str(two_phases(tmp_path, tiny_data, phases=[second], **{"from": origin})))
    ours = load_file(tmp_path / "run" / "checkpoints" / f"tokens-{TOKENS}" / "model.safetensors")
    theirs = load_file(straight / "run" / "checkpoints" / f"tokens-{2 * TOKENS}" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    card = (straight / "run" / "exports" / f"tokens-{TOKENS}" / "README.md").read_text()
    assert "The objectives are `clm` in causal, `mlm` in masked." in card


def test_metrics_count_what_causal_attention_does(straight: Path) -> None:
    config = load_run_config(straight / "train.yaml")
    batches = list(build_loader(PhasePlan(config).loader_config(config)))
    trained = [line for line in lines(straight) if "loss" in line]
    assert len(trained) == STEPS
    for step, (line, batch) in enumerate(zip(trained, batches, strict=True)):
        lengths = batch["cu_seqlens"].diff().numpy()
        bounds = batch["cu_seqlens"].tolist()
        targets = [int((batch["labels"][begin:end] != -100).sum()) for begin, end in pairwise(bounds)]
        work = batch_flops(config.model, lengths, targets, causal=step < 3)
        assert line["flops_per_second"] / line["tokens_per_second"] == pytest.approx(work / batch["tokens"])
        assert sum(each["masked_tokens"] for each in line["streams"].values()) == batch["masked"]
        assert math.isfinite(line["loss"])


@pytest.mark.slow
def test_a_step_is_shown_as_it_was(straight: Path) -> None:
    config = load_run_config(straight / "train.yaml")
    batch = next(iter(build_loader(PhasePlan(config).loader_config(config))))
    arguments = ["inspect", str(straight / "run"), "--step", "1", "--rows", "0"]
    shown = [
        subprocess.run(
            [sys.executable, "main.py", *arguments, *more],
            cwd=ROOT, env=environment(), capture_output=True, text=True, check=True,
        ).stdout
        for more in ([], ["--json"])
    ]  # fmt: skip
    assert "each token is told from those before it" in shown[0]
    assert "\u27e6" not in shown[0]
    pieces = [json.loads(line) for line in shown[1].splitlines()]
    for piece, (begin, end) in zip(pieces, pairwise(batch["cu_seqlens"].tolist()), strict=True):
        assert piece["input_ids"] == batch["input_ids"][begin + 1 : end - 1].tolist()
        assert piece["labels"] == batch["labels"][begin + 1 : end - 1].tolist()


def test_held_out_text_is_told_causally(ranks: Ranks, tiny_data: Path, straight: Path, tmp_path: Path) -> None:
    """`evaluation: {masking: next}` measures what the phase trains: the training loss of the same text, no dropout."""
    changes = {"evaluation": {"masking": "next", "max_rows": None}, "evaluations": [{"name": "held_out"}]}
    shutil.rmtree(tmp_path, ignore_errors=True)
    ranks.train(1, str(two_phases(tmp_path, tiny_data, **changes)))
    line = next(line for line in lines(tmp_path) if "validation" in line)
    config = load_run_config(tmp_path / "train.yaml")
    model = build(config.model)
    model.load_state_dict(
        load_file(tmp_path / "run" / "checkpoints" / f"tokens-{TOKENS}" / "model.safetensors"), strict=False
    )
    from data.feed.held_out import HeldOutRows
    from data.store.shards import open_stream

    total, count = 0.0, 0
    for name in ("full", "sparse"):
        stream = open_stream(f"{config.data.streams[name].path}/validation")
        for batch in HeldOutRows(stream, ROW, None, 9).batches(1, config.evaluation.masking, Path, 0, 1):
            loss = OBJECTIVES.build(OBJECTIVES.parse("clm"), plan=None).loss(model.eval(), batch)
            total, count = total + loss.sum.item(), count + loss.count
    assert line["validation"]["masked_tokens"] == count
    assert line["validation"]["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "clm", "masking": {"rate": 0.2}}, "masking: the objectives of all phases have targets of their own: leave it out"),
        ({"phases": [{**PHASES[0], "masking": {"rate": 0.2}}]}, "phases[0].masking: objective 'clm' has targets of its own (next): leave it out"),
        ({"masking": "next"}, "masking: 'next' is brought along by objective clm: name that, and no masking"),
        ({"phases": [PHASES[0], {**PHASES[1], "masking": "next"}]}, "phases[1].masking: 'next' is brought along by objective clm: name that, and no masking"),
        ({"masking": "next", "phases": [PHASES[0], {"name": "masked", "tokens": TOKENS, "objective": "mlm"}]}, "masking: 'next' is brought along by objective clm: name that, and no masking"),
        ({"objective": "diffusion", "phases": PHASES}, "objective: 'diffusion' is of no phase, phases[0].objective says 'clm': leave one out"),
        ({"objective": "clmm"}, "objective: unknown objective 'clmm', did you mean 'clm'?; a part of yours needs its file in imports"),
        ({"objective": "clm", "imports": [str(ROOT / "examples" / "mean_attention.py")], "model": {"attention": {"name": "mean"}}},
         "objective: clm: model.attention: 'mean' does not say that it can be causal: use multihead, or look at plan.causal in it and give it `causal = True`"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(
    tiny_data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load_run_config(write_config(tmp_path, tiny_data, STEPS, "full", **changes))
    assert str(error.value) == f"{tmp_path / 'train.yaml'}: {message}"


def test_a_phase_of_clm_leaves_the_masking_of_others_alone(tiny_data: Path, tmp_path: Path) -> None:
    phases = [{**PHASES[1], **SHAPE, "masking": {"rate": 0.4, "rate_schedule": {"to": 0.2}}}, PHASES[0], {"name": "end", "tokens": TOKENS, "objective": "mlm"}]  # fmt: skip
    plan = PhasePlan(load_run_config(write_config(tmp_path, tiny_data, STEPS, "full", phases=phases)))
    assert [phase.masking.describe() for phase in plan.phases] == ["0.4 to 0.2 linear", "1", "0.2"]
    assert [phase.masking.name for phase in plan.phases] == ["tokens", "next", "tokens"]
    assert [phase.is_causal for phase in plan.phases] == [False, True, False]
