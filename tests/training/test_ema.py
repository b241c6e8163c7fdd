"""The average of the weights: its formula, beside training without moving it, and to the last bit over a kill."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from rich.console import Console
from safetensors.numpy import load_file
from torch import nn
from transformers import AutoModelForMaskedLM

from callbacks.ema import WeightAverage
from flexbert_core.schema import ConfigError
from recipe.config import RunConfig, load_run_config
from recipe.phases import PhasePlan
from tests.helpers.ranks import Ranks
from tests.helpers.synthetic_runs import run_config, write_dataset
from tests.helpers.tiny import ROW, ROWS, SAVED, STEPS, check_same, forget_after, write_config
from training import trainer
from training.checkpoints.files import list_checkpoints, newest_checkpoint

PHASES = [
    {"name": "first", "tokens": "6K", "max_seq_len": 64, "global_batch_size": 8, "lr": 1e-3},
    {"name": "second", "tokens": "6K", "global_batch_size": 16},
]
EMA = {"decay": 0.8, "every": 1000}
# Steps of 512 tokens, 12 of them, then of 1024, 6 of them; those that cross a multiple of 1000 tokens, by hand.
UPDATES = [1024, 2048, 3072, 4096, 5120, 6144, 7168, 8192, 9216, 10240, 11264, 12288]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("words"))


def train(config: RunConfig) -> Path:
    trainer.train(config, Console(quiet=True))
    return config.folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A run with a checkpoint after each step."""
    config = run_config(
        tmp_path_factory.mktemp("straight"), dataset, "run", "checkpoint.interval=512", ema=EMA, phases=PHASES
    )
    return train(config)


def test_the_average_follows_its_formula(straight: Path) -> None:
    """In float64 from the checkpoints of all steps: a plain mean while 1/n > 0.2, then 0.8 of itself."""
    average: dict[str, np.ndarray] = {}
    updates = 0
    for path in list_checkpoints(straight / "checkpoints"):
        tokens = int(path.name.removeprefix("tokens-"))
        weights = load_file(path / "model.safetensors")
        if tokens in UPDATES:
            updates += 1
            share = max(1 / updates, 0.2)
            for name, tensor in weights.items():
                average[name] = (1 - share) * average.get(name, np.zeros_like(tensor)) + share * tensor.astype(float)
        if updates:
            found = load_file(path / "ema.safetensors")
            assert found.keys() == weights.keys()
            assert json.loads((path / "state.json").read_text())["run"]["ema"] == {"updates": updates}
            for name, tensor in found.items():
                np.testing.assert_allclose(tensor, average[name], atol=1e-6)
        else:
            assert not (path / "ema.safetensors").exists()
    assert updates == len(UPDATES)
    assert any(np.abs(found[name] - weights[name]).max() > 1e-3 for name in found)


def test_a_constant_stays_and_the_start_is_forgotten(tiny_data: Path, tmp_path: Path) -> None:
    plan = PhasePlan(load_run_config(write_config(tmp_path, tiny_data, 1)))
    model = nn.Linear(3, 2)
    average = WeightAverage(model, 0.9, plan, every=None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    for _ in range(30):
        average.update()
    for tensor in average.tensors().values():
        assert torch.equal(tensor, torch.full_like(tensor, 7.0))


def test_swapping_in_is_undone_to_the_last_bit(tiny_data: Path, tmp_path: Path) -> None:
    plan = PhasePlan(load_run_config(write_config(tmp_path, tiny_data, 1)))
    model = nn.Linear(3, 2)
    average = WeightAverage(model, 0.5, plan, every=None)
    average.update()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        model.weight += 1e-3
    now, weight = model.weight.detach().clone(), model.weight

    def fail() -> None:
        with average.swapped_in():
            assert torch.equal(model.weight, start["weight"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert model.weight is weight
    assert torch.equal(model.weight, now)
    assert torch.equal(average.tensors()["weight"], start["weight"])


class Stop(Callback):
    """What SIGKILL does to a run after a step: nothing more is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_killed_run_has_the_same_average(
    straight: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between updates, before the first update, and just after the first phase's checkpoint, before its export.
    Checkpoints are rarer than steps, so steps are repeated, updates among them."""
    config = run_config(tmp_path, dataset, "run", "checkpoint.interval=1500", ema=EMA, phases=PHASES)
    opened = trainer.Run.open
    for step, export in ((1, False), (5, False), (12, True), (14, False)):

        def open_with_a_stop(run: trainer.Run, step: int = step, export: bool = export) -> None:
            if export:
                monkeypatch.setattr(run.exporter, "export", lambda step: (_ for _ in ()).throw(KeyboardInterrupt))
            opened(run)
            if not export:
                run.trainer.state.callbacks.append(Stop(step))

        monkeypatch.setattr(trainer.Run, "open", open_with_a_stop)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    monkeypatch.setattr(trainer.Run, "open", opened)
    train(config)
    last = [list_checkpoints(folder / "checkpoints")[-1] for folder in (config.folder, straight)]
    files = [path / name for path in last for name in ("model.safetensors", "optimizer.safetensors", "ema.safetensors")]
    files += [
        file
        for folder in (config.folder, straight)
        for export in ("tokens-6144", "tokens-6144-ema", "tokens-12288", "tokens-12288-ema")
        for file in (folder / "exports" / export / "model.safetensors", folder / "exports" / export / "README.md")
    ]
    ours = [file for file in files if file.is_relative_to(config.folder)]
    theirs = [file for file in files if file.is_relative_to(straight)]
    assert len(ours) == len(theirs) == 11
    for left, right in zip(ours, theirs, strict=True):
        assert left.read_bytes() == right.read_bytes(), left


@pytest.mark.slow
def test_ranks_average_as_one(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    """A run of one process against one of two that share the weights (FSDP2), broken off halfway and resumed; with Muon,
    whose state of a matrix is sharded, too."""
    options: dict[str, Any] = {"optimizer": "muon", "ema": {"decay": 0.7, "every": 300}}
    one, two = tmp_path / "one", tmp_path / "two"
    ranks.train(1, str(write_config(one, tiny_data, STEPS, **options)))
    config = write_config(two, tiny_data, STEPS, trainer={"parallelism": "fsdp2"}, **options)
    ranks.train(2, str(config))
    forget_after(two, SAVED)
    ranks.train(2, str(config))
    check_same(two, one)
    last = f"tokens-{STEPS * ROWS * ROW}"
    found, expected = (load_file(folder / "run/checkpoints" / last / "ema.safetensors") for folder in (two, one))
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, atol=1e-5)
    averaged = [
        [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()][-1]
        for folder in (two, one)
    ]
    assert averaged[0]["validation_ema"]["loss"] == pytest.approx(averaged[1]["validation_ema"]["loss"], rel=1e-5)
    exports = [load_file(folder / "run/exports" / f"{last}-ema" / "model.safetensors") for folder in (two, one)]
    for name, tensor in exports[1].items():
        np.testing.assert_allclose(exports[0][name], tensor, atol=1e-5)


def test_it_is_evaluated_and_exported_beside_the_weights(straight: Path) -> None:
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "validation" in line]
    assert [line["tokens"] for line in evaluated] == [6144, 12288]
    for line in evaluated:
        assert line["validation_ema"]["loss"] != line["validation"]["loss"]
        assert line["validation_ema"]["masked_tokens"] == line["validation"]["masked_tokens"]
        card = (straight / "exports" / f"tokens-{line['tokens']}-ema" / "README.md").read_text()
        assert f"loss {line['validation_ema']['loss']:.4f} nats" in card
        updates = UPDATES.index(line["tokens"]) + 1
        assert f"moving average of the training's: decay 0.8, {updates} updates" in card
        plain = straight / "exports" / f"tokens-{line['tokens']}"
        assert "moving average" not in (plain / "README.md").read_text()
    checkpoint = newest_checkpoint(straight / "checkpoints")
    assert checkpoint is not None
    model = AutoModelForMaskedLM.from_pretrained(straight / "exports" / "tokens-12288-ema")
    embedding = model.get_input_embeddings().weight
    assert torch.equal(embedding, checkpoint.ema["encoder.embedding.tokens.weight"])
    assert not torch.equal(embedding, checkpoint.model["encoder.embedding.tokens.weight"])


def test_it_moves_nothing_and_is_off_by_default(straight: Path, dataset: Path, tmp_path: Path) -> None:
    folder = train(run_config(tmp_path, dataset, "run", phases=PHASES))
    with_it, without = (list_checkpoints(path / "checkpoints")[-1] for path in (straight, folder))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (with_it / name).read_bytes() == (without / name).read_bytes()
    assert not list(folder.rglob("*ema*"))
    assert "validation_ema" not in (folder / "metrics.jsonl").read_text()


def test_it_cannot_be_changed_on_the_way(straight: Path, dataset: Path) -> None:
    config = run_config(straight.parent.parent, dataset, "run", "ema.decay=0.9", ema=EMA, phases=PHASES)
    with pytest.raises(ConfigError, match=r"ema.decay was 0.8, now 0.9"):
        train(config)
