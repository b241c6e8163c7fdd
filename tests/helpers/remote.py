"""A stream on S3, and what tests of such streams share."""

import fcntl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.store.cache import CacheConfig
from data.store.shards import Stream
from tests.helpers.servers import BUCKET
from tests.helpers.synthetic import documents

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = documents(3, 300, 300)


def settings(folder: Path, limit: int = 10**9, **more: float) -> CacheConfig:
    return CacheConfig.model_validate(
        {"cache": str(folder / "cache"), "cache_limit": limit, "download_timeout": 5.0, **more}
    )


def key(url: str, file: str) -> str:
    return f"{url.removeprefix(f's3://{BUCKET}/')}/{file}"


def shards_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache").glob("*-*"))


def read_all(stream: Stream) -> list[np.ndarray]:
    return [
        stream.document(shard, index)
        for shard in range(len(stream.manifest.shards))
        for index in range(len(stream.lengths(shard)))
    ]


def assert_whole(stream: Stream) -> None:
    found = read_all(stream)
    assert len(found) == len(DOCUMENTS)
    for tokens, expected in zip(found, DOCUMENTS, strict=True):
        np.testing.assert_array_equal(tokens, expected)


def in_fresh_process(code: str) -> str:
    head = "from data.store.cache import CacheConfig\nfrom data.store.shards import open_stream\nfrom flexbert_core.schema import ConfigError\n"
    done = subprocess.run(
        [sys.executable, "-c", head + code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def bytes_in(folder: Path) -> int:
    """Bytes of the shards in a cache, at one moment: under its lock, as without it a file that goes between two looks
    would count beside the one that took its room."""
    if not folder.exists():
        return 0
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(file.stat().st_size for file in folder.glob("*-*") if file.exists())


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds
        time.sleep(0.005)


def flip(data: bytes) -> bytes:
    return data[:-10] + bytes([data[-10] ^ 4]) + data[-9:]
