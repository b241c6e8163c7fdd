"""Streams on S3 and on a web server: equal to the local folder; every fault of the other side is one plain line.

The servers, the sockets and the processes are real.
"""

import fcntl
import functools
import http.server
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from data import transfer
from data.cache import CacheConfig
from data.shards import Stream, open_stream
from schema import ConfigError, RunError
from tests.data.servers import BUCKET, PAGE, Bucket, Proxy, free_port
from tests.data.synthetic import documents, write_stream

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = documents(3, 300, 300)


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stream(tmp_path_factory.mktemp("remote") / "prose", "train", DOCUMENTS)


@pytest.fixture(scope="session")
def url(local: Path, bucket: Bucket) -> str:
    """The stream on S3; tests that damage it make their own."""
    return bucket.upload(local, "whole/prose/train")


@pytest.fixture
def own(local: Path, bucket: Bucket, tmp_path: Path) -> str:
    """A copy on S3 that the test may damage."""
    return bucket.upload(local, f"{tmp_path.name}/prose/train")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_FIRST_DELAY", 0.02)


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


def test_equals_what_was_written(s3: str, url: str, tmp_path: Path) -> None:
    stream = open_stream(url, settings(tmp_path))
    stream.check_files()
    assert_whole(stream)
    again = pickle.loads(pickle.dumps(stream))
    assert again.fingerprint == stream.fingerprint
    assert_whole(again)
    assert shards_in(tmp_path) == sorted(f"{shard.xxh3_64}-{shard.bytes}" for shard in stream.manifest.shards)
    child = os.fork()
    if child == 0:
        os._exit(0 if len(read_all(stream)) == len(DOCUMENTS) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_fork_makes_its_own_connections(s3: str, url: str, tmp_path: Path) -> None:
    """Parent and child download through what was one client before the fork."""
    stream = open_stream(url, settings(tmp_path))
    stream.prefetch([0, 1])
    stream.lengths(0)
    child = os.fork()
    if child == 0:
        try:
            stream.prefetch([3, 4])
            assert_whole(stream)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert_whole(stream)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_each_shard_is_downloaded_once(proxy: Proxy, url: str, tmp_path: Path) -> None:
    for _ in range(2):
        stream = open_stream(url, settings(tmp_path))
        stream.check_files()
        stream.prefetch(range(len(stream.manifest.shards)))
        assert_whole(stream)
    assert sorted(proxy.gets(".mds")) == sorted(f"/{BUCKET}/{key(url, s.file)}" for s in stream.manifest.shards)
    listings = [request for request in proxy.requests if "list-type=2" in request]
    files = len(stream.manifest.shards) + 4
    assert len(listings) == 2 * -(-files // PAGE) >= 4, "sizes come from listings, not from a request for each shard"
    assert len(proxy.requests) == len(listings) + len(stream.manifest.shards) + 2 * len(["stream.json", "chunks.npy"])


def _flip(data: bytes) -> bytes:
    return data[:-10] + bytes([data[-10] ^ 4]) + data[-9:]


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "longer", "flipped", "foreign"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_bad_shard_is_one_line(s3: str, own: str, bucket: Bucket, tmp_path: Path, damage: str, ahead: bool) -> None:
    stream = open_stream(own, settings(tmp_path, download_retries=1))
    good, bad = stream.manifest.shards[:2]
    content = bucket.get(key(own, bad.file))
    changed = {
        "truncated": content[:-100],
        "empty": b"",
        "longer": content + b"123",
        "flipped": _flip(content),
        "foreign": bucket.get(key(own, good.file)),
    }
    if damage == "missing":
        bucket.delete(key(own, bad.file))
    else:
        bucket.put(key(own, bad.file), changed[damage])
    if damage == "flipped":
        stream.check_files()
    else:
        with pytest.raises(RunError) as caught:
            stream.check_files()
        assert f"stream 'prose': shard {own}/{bad.file}" in str(caught.value)
    if ahead:
        stream.prefetch([0, 1, 2])
    for _ in range(2):  # not the second time either
        with pytest.raises(RunError) as caught:
            stream.document(1, 0)
        message = str(caught.value)
        assert "\n" not in message
        assert f"stream 'prose': shard {own}/{bad.file}" in message
        if damage == "missing":
            assert "no such file" in message
        else:
            assert f"expected {bad.bytes} bytes with xxh3_64 {bad.xxh3_64}" in message
            found = changed[damage]
            assert f"found {len(found)} with {xxhash.xxh3_64_hexdigest(found)}" in message
    np.testing.assert_array_equal(stream.document(0, 0), DOCUMENTS[0])
    stream.document(2, 0)  # waits for what another thread may still be fetching ahead
    assert f"{bad.xxh3_64}-{bad.bytes}" not in shards_in(tmp_path)
    assert not [name for name in shards_in(tmp_path) if name.endswith(".partial")]


def test_another_dataset_under_the_same_url(s3: str, own: str, bucket: Bucket, tmp_path: Path) -> None:
    assert_whole(open_stream(own, settings(tmp_path)))
    others = documents(4, 300, 300)
    bucket.upload(write_stream(tmp_path / "prose", "train", others), own.removeprefix(f"s3://{BUCKET}/"))
    for tokens, expected in zip(read_all(open_stream(own, settings(tmp_path))), others, strict=True):
        np.testing.assert_array_equal(tokens, expected)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "longer"])
def test_damage_in_the_cache_is_downloaded_again(proxy: Proxy, url: str, tmp_path: Path, damage: str) -> None:
    stream = open_stream(url, settings(tmp_path))
    assert_whole(stream)
    info = stream.manifest.shards[1]
    file = tmp_path / "cache" / f"{info.xxh3_64}-{info.bytes}"
    data = file.read_bytes()
    file.write_bytes({"truncated": data[:-100], "flipped": _flip(data), "longer": data + b"1"}[damage])
    # Another process, which has not checked it yet.
    child = os.fork()
    if child == 0:
        try:
            fresh = open_stream(url, settings(tmp_path))
            fresh.files.cache._verified.clear()  # pyright: ignore[reportAttributeAccessIssue]
            assert_whole(fresh)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert file.read_bytes() == data
    assert len(proxy.gets(info.file)) == 2


# What a fault of the server is, and whether it passes.
FAULTS = ["refuse", "cut", "503 Slow Down", "500 Internal Error", "429 Too Many Requests"]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_pass_are_tried_again(proxy: Proxy, url: str, tmp_path: Path, fault: str) -> None:
    """The first two requests for anything fail."""
    seen: dict[str, int] = {}

    def misbehave(request: str) -> str | None:
        seen[request] = seen.get(request, 0) + 1
        return fault if seen[request] <= 2 else None

    proxy.misbehave = misbehave
    stream = open_stream(url, settings(tmp_path, download_retries=2))
    stream.check_files()
    assert_whole(stream)
    assert set(seen.values()) == {3}
    assert not [name for name in shards_in(tmp_path) if name.endswith(".partial")]


def test_a_stalled_answer_is_tried_again(proxy: Proxy, url: str, tmp_path: Path) -> None:
    stream = open_stream(url, settings(tmp_path, download_timeout=0.5))
    faults = iter(["stall"])
    proxy.misbehave = lambda request: next(faults, None)
    start = time.monotonic()
    np.testing.assert_array_equal(stream.document(0, 0), DOCUMENTS[0])
    assert 0.5 <= time.monotonic() - start < 5
    assert len(proxy.gets(stream.manifest.shards[0].file)) == 2


def test_damage_on_the_way_is_fetched_once_more(proxy: Proxy, own: str, bucket: Bucket, tmp_path: Path) -> None:
    """The first answer is of another content, the second is right."""
    stream = open_stream(own, settings(tmp_path))
    file = stream.manifest.shards[1].file
    content = bucket.get(key(own, file))
    bucket.put(key(own, file), _flip(content))

    def repair(request: str) -> str | None:
        if len(proxy.gets(file)) == 2:
            bucket.put(key(own, file), content)
        return None

    proxy.misbehave = repair
    np.testing.assert_array_equal(stream.document(1, 0), open_stream(own, settings(tmp_path)).document(1, 0))
    assert len(proxy.gets(file)) == 2


@pytest.mark.parametrize(("fault", "attempts"), [("403 Forbidden", 1), ("404 NoSuchKey", 1), ("503 Slow Down", 3)])
def test_how_often_is_tried(proxy: Proxy, url: str, tmp_path: Path, fault: str, attempts: int) -> None:
    stream = open_stream(url, settings(tmp_path, download_retries=2))
    proxy.misbehave = lambda request: fault
    proxy.requests.clear()
    with pytest.raises(RunError) as caught:
        stream.document(0, 0)
    assert len(proxy.gets(".mds")) == attempts
    message = str(caught.value)
    assert "\n" not in message
    assert f"stream 'prose': shard {url}/{stream.manifest.shards[0].file}: " in message
    expected = {
        "403": f"refused (403 Forbidden): check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and the endpoint ({proxy.endpoint}; AWS_ENDPOINT_URL or S3_ENDPOINT_URL)",
        "404": "no such file",
        "503": "the server answers 503 SlowDown (after 3 attempts)",
    }
    assert expected[fault[:3]] in message


def test_no_server(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(RunError) as caught:
        open_stream("s3://data/x/train", settings(tmp_path, download_retries=2))
    assert endpoint in str(caught.value)
    assert "(after 3 attempts)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_s3_endpoint_url_works_too(s3: str, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("S3_ENDPOINT_URL", s3)
    _in_fresh_process(f"assert open_stream({url!r}, CacheConfig(cache={str(tmp_path)!r})).manifest.documents == 300")


def test_no_credentials(
    proxy: Proxy, own: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Public files need none; where they are not public, that is said."""
    file = key(own, "stream.json")
    bucket.client.put_object_acl(Bucket=BUCKET, Key=file, ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    code = f"print(open_stream({own!r}, CacheConfig(cache={str(tmp_path)!r})).manifest.documents)"
    assert _in_fresh_process(code) == "300\n"
    bucket.client.put_object_acl(Bucket=BUCKET, Key=file, ACL="private")
    caught = f"""
try:
    {code}
except ConfigError as error:
    print(error)
"""
    assert "no credentials are set: give AWS_ACCESS_KEY_ID" in _in_fresh_process(caught)


def _in_fresh_process(code: str) -> str:
    head = "from data.cache import CacheConfig\nfrom data.shards import open_stream\nfrom schema import ConfigError\n"
    done = subprocess.run(
        [sys.executable, "-c", head + code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_no_stream(s3: str, own: str, bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"s3://nowhere/x/stream.json: there is no bucket 'nowhere'.*endpoint"):
        open_stream("s3://nowhere/x", settings(tmp_path))
    with pytest.raises(ConfigError, match=r"s3://data/nothing/train: holds no stream.json: correct the URL"):
        open_stream("s3://data/nothing/train", settings(tmp_path))
    bucket.put(key(own, "stream.json"), b'{"schema_version": 2, "name": 3}')
    with pytest.raises(ConfigError, match=r"s3://data/.*stream.json: name"):
        open_stream(own, settings(tmp_path))
    with pytest.raises(ConfigError, match=r"gs:// cannot be read here: pip install gcsfs"):
        open_stream("gs://bucket/x", settings(tmp_path))
    with pytest.raises(ConfigError, match=r"nonsense:// cannot be read here: .*nonsense"):
        open_stream("nonsense://bucket/x", settings(tmp_path))


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
            sizes.append(_size(tmp_path / "cache"))
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


def _size(folder: Path) -> int:
    """Bytes of the shards in a cache, at one moment: under its lock, as without it a file that goes between two looks
    would count beside the one that took its room."""
    if not folder.exists():
        return 0
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(file.stat().st_size for file in folder.glob("*-*") if file.exists())


def test_prefetch_is_bounded_and_ahead(proxy: Proxy, url: str, tmp_path: Path) -> None:
    """Announced: all. Fetched before anything is opened: a quarter of the limit. Opening one lets the next in."""
    shards = open_stream(url, settings(tmp_path)).manifest.shards
    limit = 4 * (shards[0].bytes + shards[1].bytes) + 4
    stream = open_stream(url, settings(tmp_path, limit=limit))
    stream.prefetch(range(len(shards)))
    names = [f"{shard.xxh3_64}-{shard.bytes}" for shard in shards]
    _until(lambda: shards_in(tmp_path) == sorted(names[:2]))
    time.sleep(0.3)
    assert shards_in(tmp_path) == sorted(names[:2])
    before = len(proxy.gets(".mds"))
    stream.lengths(0)
    _until(lambda: names[2] in shards_in(tmp_path))
    assert len(proxy.gets(".mds")) == before + 1


def _until(condition: "functools.partial[bool] | object") -> None:
    start = time.monotonic()
    while not condition():  # pyright: ignore[reportCallIssue]
        assert time.monotonic() - start < 20
        time.sleep(0.005)


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
    _until(lambda: bool(proxy.gets(file)))
    threading.Timer(0.2, slow.set).start()
    with pytest.raises(RunError, match=f"{file}: no such file"):
        stream.lengths(1)
    assert len(proxy.gets(file)) == 1


def test_the_server_goes_down_and_comes_back(proxy: Proxy, url: str, tmp_path: Path) -> None:
    stream = open_stream(url, settings(tmp_path, download_retries=10))
    stream.lengths(0)
    proxy.stop()
    timer = threading.Timer(0.7, proxy.start)
    timer.start()
    start = time.monotonic()
    assert_whole(stream)
    assert time.monotonic() - start > 0.5
    timer.join()


SLEEPER = """
import sys, time
from data.cache import CacheConfig
from data.shards import open_stream
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
    _until(lambda: len(proxy.gets(".mds")) >= 2)
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
from data.cache import CacheConfig
from data.shards import open_stream
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
        assert _size(tmp_path / "cache") <= limit
        time.sleep(0.005)
    assert [process.returncode for process in processes] == [0] * 4
    gets = proxy.gets(".mds")
    if share == 1:
        assert len(gets) == len(set(gets)) == len(infos)
    else:
        assert len(gets) > len(infos)


class _Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web(local: Path) -> Iterator[str]:
    """A plain web server: no listing of sizes, no ranges."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Files, directory=str(local.parent.parent))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/prose/train"
    server.shutdown()
    server.server_close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # fsspec's own session and loop
def test_a_web_server(web: str, tmp_path: Path) -> None:
    stream = open_stream(web, settings(tmp_path))
    stream.check_files()
    stream.prefetch([0, 1])
    assert_whole(stream)
    with pytest.raises(ConfigError, match=r"holds no stream.json: correct the URL"):
        open_stream(f"{web}/nowhere", settings(tmp_path, download_retries=0))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_web_server_without_a_shard(local: Path, web: str, tmp_path: Path) -> None:
    stream = open_stream(web, settings(tmp_path, download_retries=1))
    file = local / stream.manifest.shards[2].file
    aside = file.rename(file.with_suffix(".aside"))
    try:
        with pytest.raises(RunError, match=rf"stream 'prose': shard {web}/{file.name}: is missing"):
            stream.check_files()
        with pytest.raises(RunError, match=rf"stream 'prose': shard {web}/{file.name}: no such file"):
            stream.lengths(2)
    finally:
        aside.rename(file)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_any_fsspec_url(local: Path, tmp_path: Path) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    for file in local.iterdir():
        system.pipe(f"/bucket/train/{file.name}", file.read_bytes())
    stream = open_stream("memory://bucket/train", settings(tmp_path))
    stream.check_files()
    assert_whole(stream)
    info = stream.manifest.shards[1]
    system.pipe(f"/bucket/train/{info.file}", b"short")
    with pytest.raises(RunError, match=rf"{info.file}: is 5 bytes long, expected {info.bytes}"):
        stream.check_files()
    system.rm(f"/bucket/train/{info.file}")
    fresh = open_stream("memory://bucket/train", settings(tmp_path / "other"))
    with pytest.raises(RunError, match=rf"stream 'prose': shard memory://bucket/train/{info.file}: no such file"):
        fresh.lengths(1)


def test_local_paths_touch_no_network(local: Path, tmp_path: Path) -> None:
    """In a process in which no socket can be made, and no client is imported."""
    code = f"""
import socket, sys
def forbidden(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = forbidden
stream = open_stream({str(local)!r})
stream.check_files()
stream.prefetch([0])
stream.document(0, 0)
assert not {{"boto3", "fsspec", "aiohttp"}} & set(sys.modules), sorted(sys.modules)
"""
    _in_fresh_process(code)


def test_sizes_in_configs() -> None:
    assert CacheConfig.model_validate({"cache_limit": "50gb"}).cache_limit == 50_000_000_000
    assert (
        json.loads(CacheConfig.model_validate({"cache_limit": "1.5 GiB"}).model_dump_json())["cache_limit"] == 3 << 29
    )
    for wrong in ("50g", "-1gb", 0, True):
        with pytest.raises(ValueError, match=r"cache_limit"):
            CacheConfig.model_validate({"cache_limit": wrong})
