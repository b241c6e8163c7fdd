"""The loader over streams on S3: the same batches as from the local folder, whatever the cache holds."""

import time
from pathlib import Path

import numpy as np
import pytest

from data.feed.loader import LoaderConfig, LoaderPhase, build_loader
from data.feed.mixture import DataConfig, StreamConfig
from data.store.shards import open_stream
from flexbert_core.schema import RunError
from tests.helpers.servers import Bucket
from tests.helpers.synthetic import documents, write_stream, write_tokenizer


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream of 400 documents in about 20 shards of 4 kB."""
    return write_stream(tmp_path_factory.mktemp("local") / "prose", "train", documents(0, 400, 300), chunk=4).parent


def config(path: str, cache: Path, limit: int = 10**9, workers: int = 0, lanes: int = 8) -> LoaderConfig:
    data = DataConfig(
        tokenizer=write_tokenizer(cache.parent),
        streams={"prose": StreamConfig(path=path)},
        num_workers=workers,
        cache=str(cache),
        cache_limit=limit,
        download_retries=1,
        block_documents=64,
        shuffle_shards=2,
        lanes=lanes,
    )
    phase = LoaderPhase(steps=40, global_batch_size=8, max_seq_len=64)
    return LoaderConfig(seed=3, data=data, phases=[phase])


def held(cache: Path) -> int:
    total = 0
    for file in cache.glob("*-*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches(s3: str, bucket: Bucket, local: Path, tmp_path: Path, workers: int) -> None:
    """With a cache that holds a third of the shards: what was dropped is fetched again."""
    url = bucket.upload(local, f"{tmp_path.name}/prose")
    limit = sum(info.bytes for info in open_stream(local / "train").manifest.shards) // 3
    expected = build_loader(config(str(local), tmp_path))
    loader = build_loader(config(url, tmp_path / "cache", limit, workers))
    for here, there in zip(expected, loader, strict=True):
        np.testing.assert_array_equal(here["input_ids"], there["input_ids"])
        np.testing.assert_array_equal(here["labels"], there["labels"])
        assert held(tmp_path / "cache") <= limit
    assert held(tmp_path / "cache") > limit // 2


def test_the_next_blocks_are_fetched_ahead(s3: str, bucket: Bucket, local: Path, tmp_path: Path) -> None:
    url = bucket.upload(local, f"{tmp_path.name}/prose")
    loader = build_loader(config(url, tmp_path / "cache", lanes=1))
    batches = iter(loader)
    next(batches)
    opened = len(loader.dataset.streams[0].opened)
    end = time.monotonic() + 20
    while len(list((tmp_path / "cache").glob("*-*"))) <= opened and time.monotonic() < end:
        time.sleep(0.05)
    assert len(list((tmp_path / "cache").glob("*-*"))) > opened


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_lost_on_the_way_ends_the_run_with_its_name(
    s3: str, bucket: Bucket, local: Path, tmp_path: Path, workers: int
) -> None:
    url = bucket.upload(local, f"{tmp_path.name}/prose")
    loader = build_loader(config(url, tmp_path / "cache", workers=workers))
    file = loader.dataset.streams[0].manifest.shards[-1].file
    bucket.delete(f"{tmp_path.name}/prose/train/{file}")
    with pytest.raises(RunError, match=rf"^stream 'prose': shard {url}/train/{file}: no such file: [^\n]*$"):
        for _ in loader:
            pass
