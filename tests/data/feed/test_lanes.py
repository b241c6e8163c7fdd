"""A lane plans lengths; what it no longer shows it no longer reads."""

from pathlib import Path

import numpy as np

from data.feed.loader import LoaderConfig, LoaderPhase, MixtureDataset
from data.feed.mixture import DataConfig, StreamConfig, StreamShare
from tests.helpers.synthetic import write_stream, write_tokenizer


def test_a_stream_that_left_the_mixture_is_read_no_more(tmp_path: Path) -> None:
    """What was put back of it waits for its return, behind every later block; it is not planned again for each."""
    rng = np.random.default_rng(0)
    for name in "ab":
        write_stream(tmp_path / name, "train", [np.full(n, 7) for n in rng.integers(1, 200, 400)])
    streams = {name: StreamConfig(path=str(tmp_path / name)) for name in "ab"}
    data = DataConfig(tokenizer=write_tokenizer(tmp_path), streams=streams, block_documents=32, lanes=1)
    mixtures = [{"a": StreamShare(weight=1), "b": StreamShare(weight=1)}, {"a": StreamShare(weight=1)}]
    phases = [
        LoaderPhase(steps=steps, global_batch_size=4, max_seq_len=64, streams=streams)
        for steps, streams in zip((3, 60), mixtures, strict=True)
    ]
    dataset = MixtureDataset(LoaderConfig(seed=5, data=data, phases=phases), 0, 1)
    left, blocks = dataset.streams[1], set[int]()
    for step, _, _, lanes in dataset.plan():
        cursor = lanes[0].cursor
        if step < 3:
            assert left.opened
        else:
            assert cursor.behind is not None
            blocks.add(cursor.block)
            assert step == 3 or not left.opened
            left.opened.clear()
    assert len(blocks) > 3
