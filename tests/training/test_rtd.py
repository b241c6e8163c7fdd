"""`rtd`: its loss and gradients are the formula's, its tables hang together as said, and a run of `mlm` goes on with it."""

import json
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForMaskedLM

from data.feed.loader import build_loader
from flexbert import build
from flexbert.accounting import batch_flops
from flexbert.dropout import TokenKeys, keyed_dropout
from flexbert.hf.convert import read_config
from flexbert.losses import sample_tokens
from flexbert_core.schema import ConfigError
from recipe.config import load_run_config
from recipe.cost import phase_flops
from recipe.phases import PhasePlan
from tests.helpers.in_process import go, last
from tests.helpers.ranks import Ranks
from tests.helpers.runs import ROOT
from tests.helpers.tiny import ROW, ROWS
from tests.training.rtd_runs import KEPT, PHASES, RTD, TOKENS, files, lines, made, write
from training.objectives.phases import Objectives
from training.objectives.rtd import SITE


def keys_of(batch: Any, seed: int = 9) -> TokenKeys:
    return TokenKeys(seed, batch["first_row"], batch["row_bounds"], len(batch["input_ids"]))


def reference(model: Any, batch: Any, replaced: Tensor, weight: float) -> Tensor:
    """The formula, document by document, over all logits. replaced: what stands in each masked token's place."""
    generator, detector = model.parts["generator"], model.parts["detector"]
    labels, ids = batch["labels"], batch["input_ids"]
    masked = labels != -100
    original = torch.where(masked, labels, ids)
    shown = original.clone()
    shown[masked] = replaced
    total = torch.zeros(())
    for begin, end in pairwise(batch["cu_seqlens"].tolist()):
        bounds, length, here = torch.tensor([0, end - begin], dtype=torch.int32), end - begin, slice(begin, end)
        logits = generator(ids[here], bounds, length).logits
        restored = F.cross_entropy(logits, labels[here], ignore_index=-100, reduction="sum")
        scores = detector.classifier(model.encoder(shown[here], bounds, length)).squeeze(1)
        for score, differs in zip(scores, shown[here] != original[here], strict=True):
            total = total - weight * F.logsigmoid(score if differs else -score)
        total = total + restored / batch["masking_rate"]
    return total


@pytest.mark.parametrize("embeddings", ["disentangled", "tied", "separate"])
@pytest.mark.parametrize("streams", [("full", "sparse"), ("empty", "sparse")])
def test_loss_and_gradients_are_the_formula(
    tiny_data: Path, tmp_path: Path, embeddings: str, streams: tuple[str, ...]
) -> None:
    """Also of rows without any token to mask."""
    only = [{**PHASES[0], "objective": {**RTD, "embeddings": embeddings, "weight": 7.0}}]
    config, model, objective = made(write(tmp_path, tiny_data, *streams, phases=only))
    batch = next(iter(build_loader(PhasePlan(config).loader_config(config))))
    with keyed_dropout(keys_of(batch)):
        loss = objective.loss(model, batch)
    loss.sum.backward()
    assert loss.count == objective.count(batch) == len(batch["input_ids"])
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    # What was drawn is drawn again from all logits, by the cumulative sum of the softmax.
    masked = batch["labels"] != -100
    chance = keys_of(batch).uniform(SITE)[masked]
    with torch.no_grad():
        generator = model.parts["generator"]
        probs = (
            generator(batch["input_ids"], batch["cu_seqlens"], batch["max_seqlen"]).logits[masked].double().softmax(1)
        )
    replaced = torch.tensor([int(np.searchsorted(row.cumsum(0).numpy(), float(u), side="right")) for row, u in zip(probs, chance, strict=True)], dtype=torch.int64)  # fmt: skip
    expected = reference(model, batch, replaced, 7.0)
    torch.testing.assert_close(loss.sum, expected, rtol=1e-5, atol=1e-4)
    expected.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("head."):
            assert name not in found, "the model's own head is idle"
        else:
            torch.testing.assert_close(found[name], parameter.grad, atol=2e-4, rtol=1e-4)


def test_an_empty_batch_and_one_token(tiny_data: Path, tmp_path: Path) -> None:
    _, model, objective = made(write(tmp_path, tiny_data))
    for lengths, label in (([], -100), ([1], 9), ([1], -100)):
        ids = torch.full((sum(lengths),), 9)
        bounds = torch.tensor([0, *lengths], dtype=torch.int32)
        batch = {"input_ids": ids, "labels": torch.full_like(ids, label), "cu_seqlens": bounds, "max_seqlen": 1}
        batch |= {
            "masked": int(label >= 0),
            "tokens": len(ids),
            "first_row": 0,
            "row_bounds": bounds,
            "masking_rate": 0.3,
        }
        with keyed_dropout(keys_of(batch)):
            loss = objective.loss(model, batch)
        assert loss.sum.isfinite()
        assert loss.count == len(ids)
        loss.sum.backward()


def test_replacements_follow_the_softmax_and_their_keys() -> None:
    states, weight, bias = torch.randn(1, 8), torch.randn(5, 8), torch.randn(5)
    expected = F.linear(states, weight, bias).softmax(1)[0]
    bounds = torch.tensor([0, 30_000, 60_000], dtype=torch.int32)
    chance = TokenKeys(3, 0, bounds, 60_000).uniform(17)
    drawn = sample_tokens(states.expand(60_000, 8), weight, bias, chance)
    shares = drawn.bincount(minlength=5) / 60_000
    assert (shares - expected).abs().max() < 6 * 0.5 / 60_000**0.5
    assert chance.min() >= 0
    assert chance.max() < 1
    alone = TokenKeys(3, 1, torch.tensor([0, 30_000], dtype=torch.int32), 30_000).uniform(17)
    assert torch.equal(alone, chance[30_000:])
    assert not torch.equal(TokenKeys(4, 0, bounds, 60_000).uniform(17), chance)
    certain = sample_tokens(
        states, torch.zeros(5, 8), torch.tensor([0.0, 0, 99, 0, 0]), torch.tensor([1 - 2**-53], dtype=torch.float64)
    )
    assert certain.tolist() == [2]


def test_disentangled_tables_are_those_of_the_paper(tiny_data: Path, tmp_path: Path) -> None:
    """The reference keeps the model's own part by itself: table = stopped(generator's) + part, and trains the part."""
    only = [{**PHASES[0], "objective": RTD}]
    _, model, objective = made(write(tmp_path, tiny_data, phases=only))
    plan = PhasePlan(load_run_config(tmp_path / "train.yaml"))
    objective.begin(model, plan.phases[0], True)
    table, other = model.encoder.token_table, model.parts["generator"].encoder.token_table
    assert torch.equal(table, other)
    theirs, part = torch.nn.Parameter(other.detach().clone()), torch.nn.Parameter(torch.zeros_like(other))
    ours_optimizer = torch.optim.AdamW([table, other], 0.01, weight_decay=0.0)
    optimizer = torch.optim.AdamW([part, theirs], 0.01, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        noise = torch.randn(2, *table.shape, generator=generator)

        def loss(model_table: Tensor, generator_table: Tensor, noise: Tensor = noise) -> Tensor:
            return (model_table * noise[0]).sin().sum() + (generator_table * noise[1]).cos().sum()

        objective.before_step(model)
        ours_optimizer.zero_grad()
        loss(table, other).backward()
        ours_optimizer.step()
        objective.after_step(model)
        optimizer.zero_grad()
        loss(theirs.detach() + part, theirs).backward()
        optimizer.step()
        torch.testing.assert_close(other, theirs)
        torch.testing.assert_close(table, theirs + part)


def test_flops_are_those_of_both(tiny_data: Path, tmp_path: Path) -> None:
    config, model, _ = made(write(tmp_path, tiny_data))
    phase = PhasePlan(config).phases[1]
    lengths, masked = np.array([20.0, 9.0]), np.array([5.0, 2.0])
    generator = batch_flops(model.parts["generator"].config, lengths, masked)
    decoder = 3 * 2 * 29 * (config.model.vocab_size * config.model.hidden_size + config.model.hidden_size**2)
    whole = batch_flops(config.model, lengths, lengths)
    assert phase_flops(config, phase, lengths, masked) == pytest.approx(generator + whole - decoder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": {"parallelism": "fsdp2"}}, "phases[1].objective: rtd: trainer.parallelism: fsdp2 cannot hold a generator: use ddp"),
        ({"generator": {"hiden_size": 8}}, "phases[1].objective: rtd: generator: unknown key 'hiden_size', did you mean 'hidden_size'?"),
        ({"generator": {"hidden_size": 8}}, "phases[1].objective: rtd: embeddings: disentangled wants the generator as wide as the model, 16, and not 8: use separate, or a generator of fewer layers"),
        ({"generator": {"vocab_size": 128}}, "phases[1].objective: rtd: generator.vocab_size: 128, the model has 64: leave it out"),
        ({"generator": {"max_position_embeddings": 16}}, "phases[1].objective: rtd: generator.max_position_embeddings: under the rows' 32 tokens: raise it"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(
    tiny_data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if "generator" in changes:
        changes = {"phases": [PHASES[0], {**PHASES[1], "objective": {"name": "rtd", **changes}}]}
    with pytest.raises(ConfigError) as error:
        load_run_config(write(tmp_path, tiny_data, **changes))
    assert str(error.value) == f"{tmp_path / 'train.yaml'}: {message}"


@pytest.fixture(scope="module")
def straight(ranks: Ranks, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    ranks.train(1, str(write(folder, tiny_data)))
    return folder


def test_both_parts_are_exported_and_what_is_idle_rests(straight: Path) -> None:
    run = straight / "run"
    first, last = (load_file(run / "checkpoints" / f"tokens-{n * TOKENS}" / KEPT[0]) for n in (1, 2))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert not any(name.startswith("head.") for name in moved)
    config = load_run_config(straight / "train.yaml")
    model = build(config.model, seed=1)
    parts = {name for name in first if name.startswith("parts.")}
    assert parts | {"encoder.embedding.tokens.weight"} <= moved
    Objectives(config, PhasePlan(config), model)
    begun = model.state_dict()
    assert all(torch.equal(first[name], begun[name]) for name in parts), "they rest in the phase of mlm"
    assert [path.name for path in (run / "generators").iterdir()] == [f"tokens-{2 * TOKENS}"]
    loaded = AutoModelForMaskedLM.from_pretrained(run / "generators" / f"tokens-{2 * TOKENS}")
    table = loaded.get_input_embeddings().weight
    torch.testing.assert_close(table, last["parts.generator.encoder.embedding.tokens.weight"])
    assert (run / "detectors" / f"tokens-{2 * TOKENS}" / "config.json").is_file()


@pytest.mark.slow
def test_a_rollback_to_the_border_begins_the_phase_again(tiny_data: Path, tmp_path: Path) -> None:
    """The reference leaves the same steps out from the start, and so goes back nowhere."""
    phases = [{**PHASES[0], "tokens": ROWS * ROW}, {**PHASES[1], "tokens": 2 * TOKENS, "lr": 1e-4}]
    changes = {"phases": phases, "checkpoint": {"interval": 10**9}}
    guard = {"sigmas": 0.1, "window": 8, "skip": 2}  # at so low a rate the loss goes up as often as down
    back = go(write(tmp_path / "back", tiny_data, "full", **changes, trainer={"spike_guard": guard}))
    ledger = [json.loads(line) for line in (back / "ledger.jsonl").read_text().splitlines()]
    skips = [line["skip"] for line in ledger if "skip" in line]
    assert skips
    assert len(list((back / "checkpoints").iterdir())) == 2, "it went back to the border, as nothing else is kept"
    left_out = {"skip_steps": [f"{first}-{last}" for first, last in skips]}
    never = go(write(tmp_path / "never", tiny_data, "full", **changes, trainer=left_out))
    weights = [last(run, KEPT[0]) for run in (back, never)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def thetas(run: Path, tokens: int) -> dict[str, float]:
    """Of the global layers of what is exported."""
    return {
        kind: read_config(run / kind / f"tokens-{tokens}").position.global_theta for kind in ("exports", "generators")
    }


@pytest.mark.slow
def test_an_export_without_a_step_has_the_phase_s_generator(tiny_data: Path, tmp_path: Path) -> None:
    """At step 0 that which the first step begins with; and where a kill came between the last checkpoint and its export,
    that of the last step."""
    phases = [{**PHASES[0], **PHASES[1]}]
    changes = {"phases": phases, "checkpoint": {"exports": "permanent"}, "evaluations": ["detection"]}
    run = go(write(tmp_path, tiny_data, "full", **changes))
    expected = {"exports": 160000.0, "generators": 160000.0}
    assert thetas(run, 0) == thetas(run, TOKENS) == expected
    begun = [load_file(run / kind / "tokens-0" / KEPT[0]) for kind in ("exports", "generators")]
    tables = [next(tensor for name, tensor in each.items() if "tok_embeddings" in name) for each in begun]
    assert torch.equal(*tables)
    scores = lines(run.parent)[-1]["evaluations"]
    for kind in ("exports", "generators", "detectors"):
        shutil.rmtree(run / kind / f"tokens-{TOKENS}")
    (run / "summary.json").unlink()
    go(tmp_path / "train.yaml")
    assert thetas(run, TOKENS) == expected
    assert lines(run.parent)[-1]["evaluations"] == scores


@pytest.mark.slow
@pytest.mark.parametrize(
    ("embeddings", "event"),
    [("disentangled", "after_backward"), ("disentangled", "batch_end"), ("tied", "after_backward")],
)
def test_killed_in_each_phase_and_on_the_border(
    ranks: Ranks, tiny_data: Path, straight: Path, tmp_path: Path, embeddings: str, event: str
) -> None:
    phases = [PHASES[0], {**PHASES[1], "objective": {**RTD, "embeddings": embeddings}}]
    if embeddings != "disentangled":
        straight = tmp_path / "straight"
        ranks.train(1, str(write(straight, tiny_data, phases=phases)))
    killed, kills = tmp_path / "killed", [2, 3, 4, 6]
    file = write(
        killed,
        tiny_data,
        phases=phases,
        imports=[str(ROOT / "tests" / "helpers" / "killer.py")],
        callbacks=[{"name": "killer", "steps": kills, "event": event}],
    )
    for _ in kills:
        assert ranks.run(1, "train", str(file))[0] == [-signal.SIGKILL]
    ranks.train(1, str(file))
    assert files(killed) == files(straight)
