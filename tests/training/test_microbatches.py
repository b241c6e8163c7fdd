"""How large microbatches are: rows, tokens, or what fits, the same on all ranks; and what the device is given of them."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from data.feed.batches import Batch
from data.feed.loader import build_loader
from flexbert import FlexBertForMaskedLM, build
from flexbert_core.schema import ConfigError
from recipe.config import load_run_config
from recipe.phases import PhasePlan
from recipe.sections import TrainerConfig
from recipe.slots import PARALLELISMS
from tests.helpers.ranks import Ranks
from tests.helpers.tiny import ROW, ROWS, check_same, losses, write_config
from training.composer_model import PretrainingModel
from training.fitting import fitting_rows
from training.microbatches import Microbatches
from training.objectives import Loss
from training.objectives.mlm import MaskedTokens


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [96, 12]),
        ({"microbatch_size": 10}, [10, 10]),
        ({"microbatch_tokens": 65536}, [64, 8]),
        ({"microbatch_tokens": 4000}, [3, 1]),
        ({"microbatch_size": "auto"}, [7, 12]),
    ],
    ids=str,
)
def test_rows_of_a_microbatch(options: dict[str, Any], expected: list[int]) -> None:
    """Of 96 rows of 1024 and of 12 of 8192; auto found 7 of the one and 20 of the other."""
    cut = Microbatches(TrainerConfig.model_validate(options))
    cut.found = {1024: 7, 8192: 20}
    assert [cut.rows(1024, 96), cut.rows(8192, 12)] == expected


def test_rows_and_tokens_together_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path, tiny_data, 1, trainer={"microbatch_size": 2, "microbatch_tokens": "96K"})
    with pytest.raises(ConfigError, match=r"trainer: microbatch_tokens: microbatch_size is given too.*: keep one$"):
        load_run_config(file)


SCARCE = """
import os
import torch
from flexbert_core.schema import Component
from recipe.slots import OBJECTIVES
from training.objectives.mlm import MaskedTokens

@OBJECTIVES.register("scarce")
class Scarce(MaskedTokens):
    class Config(Component):
        pass
    def loss(self, model, batch):
        found = super().loss(model, batch)
        if os.environ.get("RANK", "0") == "{rank}" and len(batch["sequences"]) > {rows}:
            class Full(torch.autograd.Function):
                @staticmethod
                def forward(ctx, x):
                    return x.clone()
                @staticmethod
                def backward(ctx, gradient):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 rows")
            found = found._replace(sum=Full.apply(found.sum))
        return found
"""


@pytest.mark.slow
def test_auto_survives_a_rank_out_of_memory(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    """In the backward of one rank of two, where DDP's reducer would stay open: both take what fits on it, and the run
    is that of plain microbatches."""
    part = tmp_path / "scarce.py"
    part.write_text(SCARCE.format(rows=1, rank=1))
    files = [
        write_config(
            tmp_path / name, tiny_data, 6, trainer={"log_interval": 1, "microbatch_size": size}, objective=objective,
            imports=[str(part)],
        )
        for name, size, objective in (("auto", "auto", "scarce"), ("plain", 1, "mlm"))
    ]  # fmt: skip
    texts = [ranks.train(2, str(file)) for file in files]
    assert f"auto: up to 1 rows of {ROW} at a time on each rank" in texts[0]
    check_same(tmp_path / "auto", tmp_path / "plain")


def test_auto_says_when_not_one_row_fits(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    part = tmp_path / "scarce.py"
    part.write_text(SCARCE.format(rows=0, rank=1))
    trainer = {"log_interval": 1, "microbatch_size": "auto"}
    file = write_config(tmp_path, tiny_data, 6, trainer=trainer, objective="scarce", imports=[str(part)])
    codes, text = ranks.run(2, "train", str(file))
    assert codes == [2, 2]
    assert f"trainer.microbatch_size: auto: not one row of {ROW} slots fits in memory: set trainer.activation_" in text


def test_out_of_memory_names_the_keys_that_spare_it(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    part = tmp_path / "scarce.py"
    part.write_text(SCARCE.format(rows=4, rank=0))
    for given, less in (({}, f"tokens={4 * ROW}"), ({"microbatch_size": 6}, "size=3")):
        file = write_config(tmp_path, tiny_data, 6, trainer=given, objective="scarce", imports=[str(part)])
        codes, text = ranks.run(1, "train", str(file))
        assert codes == [1]
        assert "Traceback" not in text
        rows = given.get("microbatch_size", ROWS)
        assert (
            f"error: {tmp_path}/run: out of memory after 0 steps, in microbatches of {rows} rows of {ROW} slots: set "
            f"trainer.microbatch_{less}, or trainer.microbatch_size=auto, or trainer.activation_checkpointing=1, or "
        ) in text


class Heavy(MaskedTokens):
    """Has memory for three rows at a time."""

    def loss(self, model: FlexBertForMaskedLM, batch: Batch) -> Loss:
        if len(batch["sequences"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 rows")
        return super().loss(model, batch)


@pytest.mark.parametrize(
    ("rows", "heavy", "expected"),
    [
        ([8, 8], {0}, {ROW: 2}),
        ([8, 8], {1}, {ROW: 2}),
        ([8, 16, 8], {1}, {ROW: 2}),
        ([4, 16], {1}, {ROW: 2}),
        ([4, 16], {0}, {ROW: 2}),
        ([3, 16], {0}, {ROW: 16}),  # three are all that the first phase has
        ([3, 16], set(), {ROW: 16}),
        ([16, 3], set(), {ROW: 16}),
    ],
    ids=str,
)
def test_auto_fits_every_phase_of_a_row_length(
    tiny_data: Path, tmp_path: Path, rows: list[int], heavy: set[int], expected: dict[int, int]
) -> None:
    phases = [
        {"name": f"p{number}", "tokens": ROW * count, "max_seq_len": ROW, "global_batch_size": count, "lr": 1e-2}
        for number, count in enumerate(rows)
    ]
    config = load_run_config(write_config(tmp_path, tiny_data, 1, phases=phases, data={"lanes": 1}))
    plan = PhasePlan(config)
    each = [(Heavy if number in heavy else MaskedTokens)(config.objective, plan=plan) for number in range(len(rows))]
    parallelism = PARALLELISMS.build(config.trainer.parallelism, world_size=1)
    model = PretrainingModel(build(config.model), each, parallelism, nullcontext, lambda: 3)
    assert fitting_rows(plan, model, 1) == expected


@pytest.mark.slow
def test_tokens_give_each_row_length_its_rows(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    phase = {"name": "short", "tokens": 2 * ROWS * ROW, "max_seq_len": ROW, "global_batch_size": ROWS, "lr": 1e-2}
    longer = {"name": "long", "tokens": 2 * ROWS * ROW, "max_seq_len": 2 * ROW, "global_batch_size": ROWS // 2}
    for name, trainer in (("tokens", {"microbatch_tokens": 2 * ROW}), ("all", {})):
        file = write_config(
            tmp_path / name, tiny_data, 4, trainer={"log_interval": 1, **trainer}, phases=[phase, longer]
        )
        ranks.train(1, str(file))
    assert losses(tmp_path / "tokens") == pytest.approx(losses(tmp_path / "all"), rel=1e-5)


def first_batch(tiny_data: Path, tmp_path: Path) -> tuple[Any, Any]:
    config = load_run_config(write_config(tmp_path, tiny_data, 1, model={"attention": {"out_dropout": 0.1}}))
    return config, next(iter(build_loader(PhasePlan(config).loader_config(config), 0, 1)))


class Looking(MaskedTokens):
    """The usual objective, which keeps what it was given."""

    def loss(self, model: FlexBertForMaskedLM, batch: Batch) -> Loss:
        self.seen = batch
        return super().loss(model, batch)


def test_a_compiled_microbatch_is_filled_before_the_device_has_it(tiny_data: Path, tmp_path: Path) -> None:
    """What comes to the device goes to the model as it is: nothing more is copied there in the middle of a step."""
    config, batch = first_batch(tiny_data, tmp_path)
    gap = {**batch, "slots": 2 * batch["slots"]}
    parts = Microbatches(TrainerConfig(compile=True, microbatch_size=3))(gap)
    assert [len(part["input_ids"]) for part in parts] == [6 * ROW, 6 * ROW, 4 * ROW]
    assert [part["is_last"] for part in parts] == [False, False, True]
    objective = Looking(config.objective, plan=PhasePlan(config))
    parallelism = PARALLELISMS.build(config.trainer.parallelism, world_size=1)
    model = PretrainingModel(build(config.model), [objective], parallelism, nullcontext, lambda: 3)
    model(parts[0])
    assert objective.seen is parts[0]


def test_microbatches_are_pinned_for_a_device(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, batch = first_batch(tiny_data, tmp_path)
    pinned = list[int]()

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:  # needs a driver
        pinned.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    for part in Microbatches(TrainerConfig(), pins=True)(batch):
        on_device = [each for each in part.values() if isinstance(each, torch.Tensor)]
        assert {each.data_ptr() for each in on_device} == set(pinned)
    pinned.clear()
    Microbatches(TrainerConfig())(batch)
    assert pinned == []
