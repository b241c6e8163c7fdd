"""Masking `next`: the target of each token is the one behind it in its document, and nothing is hidden."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.feed.held_out import HeldOutRows
from data.feed.masking import MASKINGS, Vocabulary
from data.feed.philox import RowNames
from data.store.shards import open_stream
from tests.helpers.synthetic import documents, write_stream


def test_targets_of_a_batch(tmp_path: Path) -> None:
    texts = [*documents(2, 30, 40), np.array([7])]
    write_stream(tmp_path / "prose", "validation", texts)
    stream = open_stream(str(tmp_path / "prose" / "validation"))
    config: Any = MASKINGS.parse("next")
    found = set[tuple[int, ...]]()
    for batch in HeldOutRows(stream, 64, None, 5).batches(4, config, Path, 0, 1):
        ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
        for begin, end in pairwise(batch["cu_seqlens"].tolist()):
            assert labels[begin : end - 1] == ids[begin + 1 : end]
            assert labels[end - 1] == -100
            found.add(tuple(ids[begin + 1 : end - 1]))
        assert batch["masked"] == len(ids) - sum(batch["sequences"]) == len(batch["masked_streams"])
    assert found == {tuple(text.tolist()) for text in texts}


def test_odd_shapes() -> None:
    special = np.arange(8) < 4
    masking = MASKINGS.build(MASKINGS.parse("next"), vocabulary=Vocabulary(3, special, np.flatnonzero(~special), Path))
    none = RowNames(np.zeros(0, np.uint64), np.zeros(0, np.uint32), np.zeros(0, np.int64))
    assert len(masking.mask(np.zeros(0, np.uint16), np.zeros(0, np.int64), none).position) == 0
    # A document of one token has no target; [CLS] and [SEP] alone have one.
    names = RowNames(np.zeros(1, np.uint64), np.zeros(1, np.uint32), np.array([1, 3, 4]))
    targets = masking.mask(np.array([5, 1, 2, 6], np.uint16), np.array([4]), names)
    assert (targets.position.tolist(), targets.token.tolist()) == ([1], [2])


def test_its_rate_is_no_choice() -> None:
    for node in ({"name": "next", "rate": 0.5}, {"name": "next", "rate_schedule": {"to": 0.5}}):
        with pytest.raises(ValueError, match=r"rate"):
            MASKINGS.parse(node)
