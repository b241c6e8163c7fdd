"""The cache folder by itself: who goes first, what is never taken away, what is left by others."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from data.store.cache import PARTIAL, CachedShard, ShardCache
from flexbert_core.schema import ConfigError

ROOT = Path(__file__).parents[3]


def content(number: int) -> bytes:
    """100 bytes."""
    return bytes([number]) * 100


def shard(number: int) -> CachedShard:
    return CachedShard(xxhash.xxh3_64_hexdigest(content(number)), 100)


def download(number: int) -> Callable[[int], None]:
    def write(handle: int) -> None:
        os.pwrite(handle, content(number), 0)

    return write


def forbidden(handle: int) -> None:
    raise AssertionError("it was in the cache")


def fetch(cache: ShardCache, number: int, ahead: bool = False) -> int | None:
    return cache.open(shard(number), download(number), ahead)


def fetch_and_close(cache: ShardCache, *numbers: int) -> None:
    for number in numbers:
        handle = fetch(cache, number)
        assert handle is not None
        assert os.pread(handle, 200, 0) == content(number)
        os.close(handle)
        time.sleep(0.01)  # modification times are those of a coarse clock


def held(cache: ShardCache) -> set[int]:
    names = {shard(number).name: number for number in range(20)}
    return {names[path.name] for path in cache.folder.glob("*-*")}


def test_the_least_recently_opened_goes_first(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 399)
    fetch_and_close(cache, 0, 1, 2)
    assert held(cache) == {0, 1, 2}
    fetch_and_close(cache, 0)
    fetch_and_close(cache, 3)
    assert held(cache) == {0, 2, 3}
    cache.has(shard(2))
    time.sleep(0.01)
    fetch_and_close(cache, 4)
    assert held(cache) == {2, 3, 4}


def test_what_is_in_use_goes_last(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 300)
    handle = fetch(cache, 0)
    assert handle is not None
    fetch_and_close(cache, 1, 2, 3)
    assert held(cache) == {0, 2, 3}
    others = [fetch(cache, 2), fetch(cache, 3)]
    assert fetch(cache, 4, ahead=True) is None  # nothing in use makes room for what is only announced
    assert held(cache) == {0, 2, 3}
    fetch_and_close(cache, 5)
    assert held(cache) == {2, 3, 5}
    assert os.pread(handle, 200, 0) == content(0)
    for open_handle in [handle, *others]:
        assert open_handle is not None
        os.close(open_handle)


def test_fetching_ahead_leaves_room_for_use(tmp_path: Path) -> None:
    """An eighth of the limit stays for what is opened next without being announced."""
    cache = ShardCache(tmp_path / "cache", 800)
    used = [fetch(cache, number) for number in range(6)]
    fetch_and_close(cache, 6, 7)
    ahead = fetch(cache, 8, ahead=True)
    assert ahead is not None
    assert fetch(cache, 9, ahead=True) is None
    assert held(cache) == {0, 1, 2, 3, 4, 5, 7, 8}
    for handle in [*used, ahead]:
        assert handle is not None
        os.close(handle)


def test_it_waits_for_room_that_others_take(tmp_path: Path) -> None:
    """Two downloads do not fit at once: the second begins when the first is done, and then evicts it."""
    cache = ShardCache(tmp_path / "cache", 150)
    begun, go_on = threading.Event(), threading.Event()

    def slow(handle: int) -> None:
        begun.set()
        assert go_on.wait(10)
        download(0)(handle)

    first = threading.Thread(target=lambda: os.close(cache.open(shard(0), slow) or -1))
    first.start()
    assert begun.wait(10)
    second = threading.Thread(target=lambda: fetch_and_close(cache, 1))
    second.start()
    time.sleep(0.2)
    assert second.is_alive()
    assert sum(path.stat().st_size for path in cache.folder.glob("*-*")) == 100
    go_on.set()
    first.join(10)
    second.join(10)
    assert held(cache) == {1}


def test_a_failed_download_leaves_nothing(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1000)

    def fails(handle: int) -> None:
        os.pwrite(handle, b"half", 0)
        raise ConnectionError("lost")

    with pytest.raises(Exception, match="lost"):
        cache.open(shard(0), fails)
    assert [path.name for path in cache.folder.iterdir()] == ["lock"]
    fetch_and_close(cache, 0)


@pytest.mark.parametrize("damage", [b"", content(0)[:-1], content(0) + b"1", content(1)])
def test_a_damaged_copy_is_replaced_once(tmp_path: Path, damage: bytes) -> None:
    fetch_and_close(ShardCache(tmp_path / "cache", 1000), 0)
    (tmp_path / "cache" / shard(0).name).write_bytes(damage)
    cache = ShardCache(tmp_path / "cache", 1000)
    fetch_and_close(cache, 0)
    handle = cache.open(shard(0), forbidden)
    assert handle is not None
    os.close(handle)


HOLDER = """
import os, sys, time
from pathlib import Path
from data.store.cache import CachedShard, ShardCache
def download(handle):
    if sys.argv[5] == "fork" and os.fork() == 0:
        time.sleep(100)
    print("begun", flush=True)
    time.sleep(100)
ShardCache(Path(sys.argv[1]), int(sys.argv[2])).open(CachedShard(sys.argv[3], int(sys.argv[4])), download)
"""


@pytest.mark.parametrize("way", ["alone", "fork"])
def test_a_killed_process_gives_up_its_claim(tmp_path: Path, way: str) -> None:
    """Killed in the middle of a download, also while a child of it lives on: the next one goes on at once."""
    folder = tmp_path / "cache"
    arguments = [str(folder), "250", shard(0).xxh3_64, "100", way]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        cache = ShardCache(folder, 250)
        fetch_and_close(cache, 1, 2)  # room for one beside the claim
        assert {path.name for path in folder.glob("*-*")} == {shard(0).name + PARTIAL, shard(2).name}
        assert cache.open(shard(0), forbidden, ahead=True) is None
        process.kill()
        process.wait()
        cache.check_fits([shard(0)], "a stream")
        assert {path.name for path in folder.glob("*-*")} == {shard(2).name}
        fetch_and_close(cache, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_an_opener_needs_no_lock(tmp_path: Path) -> None:
    """While another process is about to remove the file, or counts, it can be opened."""
    cache = ShardCache(tmp_path / "cache", 1000)
    fetch_and_close(cache, 0)
    with (cache.folder / "lock").open() as counting, (cache.folder / shard(0).name).open() as removing:
        fcntl.flock(counting, fcntl.LOCK_EX)
        fcntl.flock(removing, fcntl.LOCK_EX)
        handle = cache.open(shard(0), forbidden)
    assert handle is not None
    assert os.pread(handle, 200, 0) == content(0)
    os.close(handle)


def test_small_files_that_stay(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 100)
    folder = cache.keep("tokenizers", {"a.json": b"one", "b.json": b"two"})
    assert cache.keep("tokenizers", {"b.json": b"two", "a.json": b"one"}) == folder
    other = cache.keep("tokenizers", {"a.json": b"on", "b.json": b"two"})
    assert other != folder
    (folder / "a.json").write_bytes(b"damaged")
    assert (cache.keep("tokenizers", {"a.json": b"one", "b.json": b"two"}) / "a.json").read_bytes() == b"one"
    fetch_and_close(cache, 0)
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted([folder.name, other.name])


def test_too_small_or_not_writable(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 99)
    with pytest.raises(ConfigError, match=r"data.cache_limit: 99 bytes is less than the largest shard of x, 100 bytes"):
        cache.check_fits([shard(0)], "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data.cache: .*file/cache: .*: give a folder that can be written"):
        ShardCache(tmp_path / "file" / "cache", 1000).open(shard(0), forbidden)
