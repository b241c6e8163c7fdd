"""The folder that shards of remote streams are downloaded to: its limit, prefetch, several processes, its end.

The servers, the sockets and the processes are real.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data.store.shards import open_stream
from flexbert_core.schema import ConfigError, RunError
from tests.helpers.remote import ROOT, assert_whole, bytes_in, key, settings, shards_in, until
from tests.helpers.servers import Bucket, Proxy

pytestmark = pytest.mark.usefixtures("quick")


def test_a_limit_below_the_largest_shard(proxy: Proxy, url: str, tmp_path: Path) -> None:
    stream = open_stream(url, settings(tmp_path, limit=1000))
    largest = max(shard.bytes for shard in stream.manifest.shards)
    for use, size in ((stream.check_files, largest), (lambda: stream.lengths(0), stream.manifest.shards[0].bytes)):
        with pytest.raises(
            ConfigError, match=r"data.cache_limit: 1,000 bytes is less than the largest shard"
        ) as caught:
            use()
        assert f"{size:,} bytes" in str(caught.value)
    assert not proxy.gets(".mds")


def test_a_cache_that_cannot_be_written(s3: str, url: str, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    stream = open_stream(url, settings(tmp_path))
    with pytest.raises(ConfigError, match=r"data.cache: .*cache: .*give a folder that can be written"):
        stream.lengths(0)


def test_the_cache_is_emptied_meanwhile(s3: str, url: str, tmp_path: Path) -> None:
    stream = open_stream(url, settings(tmp_path))
    stream.lengths(0)
    subprocess.run(["rm", "-rf", str(tmp_path / "cache")], check=True)
    assert_whole(stream)


def test_nothing_is_held_beyond_the_limit(s3: str, url: str, tmp_path: Path) -> None:
    """With room for three of the shards, all are read, in any order, with prefetch; the folder never holds more."""
    stream = open_stream(url, settings(tmp_path))
    limit = 3 * max(shard.bytes for shard in stream.manifest.shards)
    stream = open_stream(url, settings(tmp_path, limit=limit))
    sizes, stop = [], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            sizes.append(bytes_in(tmp_path / "cache"))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    rng = np.random.default_rng(5)
    count = len(stream.manifest.shards)
    assert count > 6
    try:
        for shard in rng.integers(0, count, 100):
            stream.prefetch([int(shard), *rng.integers(0, count, 3).tolist()])
            stream.document(int(shard), 0)
    finally:
        stop.set()
        watcher.join()
    assert limit // 2 < max(sizes) <= limit


def room_taken(folder: Path, processes: list[int]) -> int:
    """Bytes on disk of a cache's shards, those too that are evicted and that one of the processes has still open."""
    sizes = {}
    shards = [*(folder / "cache").glob("*-*")]
    handles = [handle for process in processes for handle in Path(f"/proc/{process}/fd").iterdir()]
    for path in (*shards, *handles):
        try:
            file = path.readlink() if path in handles else path
            if file.is_relative_to(folder / "cache") and "-" in file.name:
                facts = path.stat()
                sizes[facts.st_ino] = facts.st_size
        except FileNotFoundError:  # evicted, or given back, since it was listed
            continue
    return sum(sizes.values())


def test_streams_of_a_process_share_what_it_holds_open(s3: str, url: str, tmp_path: Path) -> None:
    limit = 8 * max(shard.bytes for shard in open_stream(url, settings(tmp_path)).manifest.shards)
    streams = [open_stream(url, settings(tmp_path, limit=limit)) for _ in range(3)]
    for stream in streams:
        for shard in range(6):
            stream.lengths(shard)
    held = sum(stream.manifest.shards[shard].bytes for stream in streams for shard in stream.opened)
    assert limit // 4 < held <= limit // 2


def test_processes_with_nothing_to_do_give_back_what_was_evicted(s3: str, url: str, tmp_path: Path) -> None:
    """Two processes hold all of the cache and wait; what a third takes of it is free within a second."""
    infos = open_stream(url, settings(tmp_path)).manifest.shards
    limit = 4 * max(info.bytes for info in infos)
    stream = open_stream(url, settings(tmp_path, limit=limit))
    opened, stop = os.pipe(), os.pipe()
    children = []
    for first in (0, 2):
        child = os.fork()
        if child == 0:
            try:
                stream.lengths(first)
                stream.lengths(first + 1)
            except BaseException:
                os.write(opened[1], b"0")
                os._exit(1)
            os.write(opened[1], b"1")
            os.read(stop[0], 1)
            os._exit(0)
        children.append(child)
        assert os.read(opened[0], 1) == b"1"
    try:
        assert room_taken(tmp_path, children) == sum(info.bytes for info in infos[:4])
        for shard in range(4, 8):
            stream.lengths(shard)
        names = {f"{info.xxh3_64}-{info.bytes}" for info in infos[:2]}
        assert not names & {*shards_in(tmp_path)}, "the shards of the first process had to go"
        until(lambda: room_taken(tmp_path, [os.getpid(), *children]) <= limit)
    finally:
        os.write(stop[1], b"11")
        for child in children:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for end in (*opened, *stop):
            os.close(end)


def test_prefetch_is_bounded_and_ahead(proxy: Proxy, url: str, tmp_path: Path) -> None:
    """Announced: all. Fetched before anything is opened: a quarter of the limit. Opening one lets the next in."""
    shards = open_stream(url, settings(tmp_path)).manifest.shards
    limit = 4 * (shards[0].bytes + shards[1].bytes) + 4
    stream = open_stream(url, settings(tmp_path, limit=limit))
    stream.prefetch(range(len(shards)))
    names = [f"{shard.xxh3_64}-{shard.bytes}" for shard in shards]
    until(lambda: shards_in(tmp_path) == sorted(names[:2]))
    time.sleep(0.3)
    assert shards_in(tmp_path) == sorted(names[:2])
    before = len(proxy.gets(".mds"))
    stream.lengths(0)
    until(lambda: names[2] in shards_in(tmp_path))
    assert len(proxy.gets(".mds")) == before + 1


def test_opening_waits_for_a_prefetch_and_gets_its_error(
    proxy: Proxy, own: str, bucket: Bucket, tmp_path: Path
) -> None:
    stream = open_stream(own, settings(tmp_path))
    file = stream.manifest.shards[1].file
    bucket.delete(key(own, file))
    slow = threading.Event()

    def misbehave(request: str) -> None:
        if file in request:
            slow.wait(10)

    proxy.misbehave = misbehave
    stream.prefetch([1])
    until(lambda: bool(proxy.gets(file)))
    threading.Timer(0.2, slow.set).start()
    with pytest.raises(RunError, match=f"{file}: no such file"):
        stream.lengths(1)
    assert len(proxy.gets(file)) == 1


SLEEPER = """
import sys, time
from data.store.cache import CacheConfig
from data.store.shards import open_stream
stream = open_stream(sys.argv[1], CacheConfig(cache=sys.argv[2], download_timeout=100.0))
stream.prefetch(range(4))
print("started", flush=True)
if sys.argv[3] == "end":
    time.sleep(0.5)
else:
    try:
        stream.lengths(0)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize("way", ["end", "interrupt"])
def test_ends_promptly_while_downloads_hang(proxy: Proxy, url: str, tmp_path: Path, way: str) -> None:
    proxy.misbehave = lambda request: "stall" if ".mds" in request else None
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, url, str(tmp_path / "cache"), way],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    until(lambda: len(proxy.gets(".mds")) >= 2)
    time.sleep(0.1)
    start = time.monotonic()
    if way == "interrupt":
        process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert time.monotonic() - start < 5
    assert (process.returncode, errors) == (0, "")
    assert output == ("" if way == "end" else "interrupted\n")


READER = """
import random, sys
from data.store.cache import CacheConfig
from data.store.shards import open_stream
url, cache, limit, seed = sys.argv[1:]
stream = open_stream(url, CacheConfig(cache=cache, cache_limit=int(limit)))
order = list(range(len(stream.manifest.shards)))
random.Random(int(seed)).shuffle(order)
stream.prefetch(order[:5])
for shard in [*order, *sorted(order)]:
    for index in range(len(stream.lengths(shard))):
        stream.document(shard, index)  # checked against the hashes of the manifest
"""


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_processes_share_a_cache(proxy: Proxy, url: str, tmp_path: Path, share: float) -> None:
    """Four processes at once. With room for all: each shard is downloaded once. With less: all still read the truth."""
    infos = open_stream(url, settings(tmp_path)).manifest.shards
    limit = int(sum(info.bytes for info in infos) * share)
    arguments = [sys.executable, "-c", READER, url, str(tmp_path / "cache"), str(limit)]
    processes = [subprocess.Popen([*arguments, str(seed)], cwd=ROOT) for seed in range(4)]
    while any(process.poll() is None for process in processes):
        assert bytes_in(tmp_path / "cache") <= limit
        time.sleep(0.005)
    assert [process.returncode for process in processes] == [0] * 4
    gets = proxy.gets(".mds")
    if share == 1:
        assert len(gets) == len(set(gets)) == len(infos)
    else:
        assert len(gets) > len(infos)
