"""A masking rate that moves over a phase: a function of the step alone, whatever was read before."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.feed.batches import Batch
from data.feed.loader import LoaderConfig, LoaderPhase, build_loader
from data.feed.masking import IGNORE
from data.feed.mixture import DataConfig, StreamConfig
from tests.helpers.synthetic import documents, write_stream, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streams")
    write_stream(path / "prose", "train", documents(0, 150, 400))
    return path


def config(folder: Path, workers: int = 0, shape: str = "linear", last: float = 0.1) -> LoaderConfig:
    """Two parts of one phase, of 4 and 8 rows, whose rate moves from 0.5; then a phase of another rate."""
    moving: dict[str, Any] = {"rate": 0.5, "rate_schedule": {"to": last, "shape": shape}}
    return LoaderConfig(
        seed=3,
        data=DataConfig(
            tokenizer=write_tokenizer(folder),
            streams={"prose": StreamConfig(path=str(folder / "prose"))},
            num_workers=workers,
            block_documents=40,
        ),
        phases=[
            LoaderPhase(number=0, steps=8, global_batch_size=4, max_seq_len=128, masking=moving),
            LoaderPhase(number=0, steps=8, global_batch_size=8, max_seq_len=128, masking=moving),
            LoaderPhase(number=1, steps=2, global_batch_size=8, max_seq_len=128, masking={"rate": 0.25}),
        ],
    )


def expected_rates(shape: str, last: float) -> list[float]:
    done = [4 * step for step in range(8)] + [32 + 8 * step for step in range(8)]
    ways = [rows / 96 for rows in done]
    if shape == "cosine":
        ways = [(1 - math.cos(math.pi * way)) / 2 for way in ways]
    return [0.5 + (last - 0.5) * way for way in ways] + [0.25, 0.25]


def equal(left: Batch, right: Batch) -> bool:
    return all(np.array_equal(left[key], right[key]) for key in ("input_ids", "labels", "cu_seqlens"))


@pytest.mark.parametrize(("shape", "last"), [("linear", 0.1), ("cosine", 0.1), ("linear", 0.9)])
def test_each_step_has_its_rate(folder: Path, shape: str, last: float) -> None:
    loader = build_loader(config(folder, shape=shape, last=last))
    rates = expected_rates(shape, last)
    assert [loader.dataset.steps.masking(step).rate for step in range(18)] == pytest.approx(rates, abs=1e-12)
    for batch, rate in zip(loader, rates, strict=True):
        ordinary = batch["tokens"] - 2 * sum(batch["sequences"])
        found = int((batch["labels"] != IGNORE).sum()) / ordinary
        assert abs(found - rate) < 6 * math.sqrt(rate * (1 - rate) / ordinary)


def test_it_goes_on_where_it_was_and_is_alike_on_all_ranks_and_workers(folder: Path) -> None:
    straight = list(build_loader(config(folder)))
    loader = build_loader(config(folder))
    batches = iter(loader)
    for _ in range(11):
        next(batches)
    again = build_loader(config(folder, workers=2))
    again.load_state_dict(loader.state_dict())
    assert all(equal(ours, theirs) for ours, theirs in zip(again, straight[11:], strict=True))
    ranks = [list(build_loader(config(folder), rank, 2)) for rank in range(2)]
    for step, whole in enumerate(straight):
        assert np.array_equal(np.concatenate([rank[step]["labels"] for rank in ranks]), whole["labels"])
