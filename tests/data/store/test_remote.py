"""Streams on S3 and on a web server: equal to the local folder; damage is one plain line, or fetched again.

The servers, the sockets and the processes are real.
"""

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import xxhash

from data.store.cache import CacheConfig
from data.store.remote import list_files
from data.store.shards import open_stream
from data.store.transfer import Patience, open_store
from flexbert_core.schema import ConfigError, RunError
from tests.helpers.remote import DOCUMENTS, assert_whole, flip, in_fresh_process, key, read_all, settings, shards_in
from tests.helpers.servers import BUCKET, PAGE, Bucket, Proxy
from tests.helpers.synthetic import documents, write_stream

pytestmark = pytest.mark.usefixtures("quick")


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
        "flipped": flip(content),
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
    file.write_bytes({"truncated": data[:-100], "flipped": flip(data), "longer": data + b"1"}[damage])
    np.save(tmp_path / "expected.npy", np.concatenate(DOCUMENTS))
    in_fresh_process(  # one that has not checked it yet
        "import numpy as np\n"
        f"stream = open_stream({url!r}, CacheConfig(cache={str(tmp_path / 'cache')!r}, cache_limit=10**9))\n"
        "shards = range(len(stream.manifest.shards))\n"
        "found = [stream.document(shard, index) for shard in shards for index in range(len(stream.lengths(shard)))]\n"
        f"assert np.array_equal(np.concatenate(found), np.load({str(tmp_path / 'expected.npy')!r}))\n"
    )
    assert file.read_bytes() == data
    assert len(proxy.gets(info.file)) == 2


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
    in_fresh_process(code)


def test_a_stream_at_the_root_of_a_bucket(s3: str, local: Path, bucket: Bucket, tmp_path: Path) -> None:
    bucket.client.create_bucket(Bucket="whole")
    for file in local.iterdir():
        bucket.client.put_object(Bucket="whole", Key=file.name, Body=file.read_bytes())
    for url in ("s3://whole", "s3://whole/"):
        stream = open_stream(url, settings(tmp_path))
        stream.check_files()
        assert_whole(stream)
        assert list_files(url, settings(tmp_path)) == sorted(file.name for file in local.iterdir())
    store = open_store("s3://whole", Patience(0, 5.0))
    store.write("a/b", io.BytesIO(b"12"))
    assert store.sizes([])["a/b"] == 2
    store.remove("a/b")
    assert "a/b" not in store.sizes([])


def test_sizes_in_configs() -> None:
    assert CacheConfig.model_validate({"cache_limit": "50gb"}).cache_limit == 50_000_000_000
    assert (
        json.loads(CacheConfig.model_validate({"cache_limit": "1.5 GiB"}).model_dump_json())["cache_limit"] == 3 << 29
    )
    for wrong in ("50g", "-1gb", 0, True):
        with pytest.raises(ValueError, match=r"cache_limit"):
            CacheConfig.model_validate({"cache_limit": wrong})
