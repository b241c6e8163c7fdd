"""Batches of one size: what fills the empty slots changes nothing, and fits where the batch does."""

from typing import Any

import pytest
import torch

from flexbert import FlexBertConfig, build
from tests.helpers.models import tiny
from training.static_shapes import fill_slots


def batch_with_gaps(lengths: list[list[int]], row: int) -> dict[str, Any]:
    """As the loader makes them: lengths of the documents of each row."""
    flat = [length for documents in lengths for length in documents]
    ids = torch.randint(0, 97, (sum(flat),), generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids,
        "labels": torch.where(ids % 3 == 0, ids, -100),
        "cu_seqlens": torch.tensor([0, *flat]).cumsum(0).int(),
        "max_seqlen": max(flat),
        "sequences": [len(documents) for documents in lengths],
        "row_bounds": torch.tensor([0, *map(sum, lengths)]).cumsum(0).int(),
        "slots": row * len(lengths),
    }


@pytest.mark.parametrize("position", ["learned", "rope", "alibi"])
@pytest.mark.parametrize(
    ("lengths", "filler"),
    [
        ([[55]] * 8, [64, 8]),  # 72 empty slots: more than a row, and than the table of positions
        ([[32]] * 4, [64, 64]),
        ([[60, 3], [64]], [1]),
    ],
    ids=str,
)
def test_filler_is_no_longer_than_a_row(lengths: list[list[int]], filler: list[int], position: str) -> None:
    model = build(tiny(position=position, max_position_embeddings=64))
    batch = batch_with_gaps(lengths, 64)
    filled = fill_slots(batch)
    names = ("input_ids", "cu_seqlens", "max_seqlen", "labels")
    documents = len(batch["cu_seqlens"]) - 1
    assert filled["cu_seqlens"].diff()[documents:].tolist() == filler
    assert filled["cu_seqlens"].dtype == torch.int32
    assert len(filled["input_ids"]) == len(filled["labels"]) == batch["slots"]
    assert filled["row_bounds"].tolist() == [*batch["row_bounds"].tolist(), batch["slots"]]
    assert filled["max_seqlen"] == filled["cu_seqlens"].diff().max()
    plain, same = (model(*(each[name] for name in names)).loss for each in (batch, filled))
    torch.testing.assert_close(same, plain)
    assert fill_slots(filled) is filled


def test_a_batch_filled_to_its_slots_gives_the_same_loss() -> None:
    config = FlexBertConfig.from_yaml("modernbert-tiny")
    model = build(config)
    ids = torch.arange(20, 57)
    batch = {"input_ids": ids, "labels": torch.where(ids % 3 == 0, ids, -100), "cu_seqlens": torch.tensor([0, 30, 37])}
    batch |= {"cu_seqlens": batch["cu_seqlens"].int(), "max_seqlen": 30, "sequences": [1, 1], "slots": 64}
    batch["row_bounds"] = batch["cu_seqlens"]
    filled = fill_slots(batch)
    assert len(filled["input_ids"]) == len(filled["labels"]) == filled["cu_seqlens"][-1] == 64
    assert fill_slots(filled) is filled
    names = ("input_ids", "cu_seqlens", "max_seqlen", "labels")
    plain, same = (model(*(each[name] for name in names)).loss for each in (batch, filled))
    torch.testing.assert_close(same, plain)
