"""Streams on a real S3 server and a real web server: equal to the local ones, bounded on disk, loud when damaged."""

import functools
import http.server
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from data.inspect import inspect
from data.loader import LoaderConfig, LoaderPhase, build_loader
from data.masking import MaskingConfig
from data.mixture import DataConfig, StreamConfig
from data.remote import RemoteConfig
from data.shards import Stream, open_stream
from schema import ConfigError, RunError, parse_size
from tests.data.s3 import NO_OTHER_S3, client, s3_server, upload
from tests.data.synthetic import documents, write_stream

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def endpoint(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The S3 server, the only one that the environment knows."""
    for name, value in {**NO_OTHER_S3, "AWS_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream of 400 documents in about 20 shards of 4 kB."""
    path = tmp_path_factory.mktemp("local")
    return write_stream(path / "prose", "train", documents(0, 400, 300), chunk=4).parent


_buckets = iter(range(10**6))


@pytest.fixture
def bucket() -> str:
    return f"bucket-{next(_buckets)}"


def config(tmp_path: Path, limit: int = 10**9, retries: int = 2) -> RemoteConfig:
    return RemoteConfig(cache=str(tmp_path / "cache"), cache_limit=limit, retries=retries)


def read_all(stream: Stream) -> list[list[int]]:
    return [
        stream.document(shard, index).tolist()
        for shard in range(len(stream.manifest.shards))
        for index in range(stream.manifest.shards[shard].documents)
    ]


def cached(tmp_path: Path) -> list[Path]:
    return [file for file in (tmp_path / "cache").iterdir() if file.is_file() and file.name != "lock"]


def loader_config(path: str, remote: RemoteConfig, workers: int = 0, lanes: int = 8) -> LoaderConfig:
    data = DataConfig(
        tokenizer="none",
        streams={"prose": StreamConfig(path=path)},
        num_workers=workers,
        remote=remote,
        block_documents=64,
        shuffle_shards=2,
        lanes=lanes,
    )
    phase = LoaderPhase(steps=40, global_batch_size=8, max_seq_len=64, masking=MaskingConfig())
    return LoaderConfig(seed=3, data=data, phases=[phase])


def test_equals_the_local_stream(endpoint: str, bucket: str, local: Path, tmp_path: Path) -> None:
    url = upload(endpoint, local, bucket, "prose")
    stream, here = open_stream(f"{url}/train", config(tmp_path)), open_stream(local / "train")
    stream.check_files()
    assert read_all(stream) == read_all(here)
    assert stream.fingerprint == here.fingerprint
    again = pickle.loads(pickle.dumps(stream))
    np.testing.assert_array_equal(again.document(3, 1), here.document(3, 1))
    names = {file.name: file.read_bytes() for file in cached(tmp_path)}
    assert names == {info.xxh3_64: (local / "train" / info.file).read_bytes() for info in here.manifest.shards}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_the_same_batches(
    endpoint: str, bucket: str, local: Path, tmp_path: Path, workers: int
) -> None:
    """With a cache that holds a third of the shards: what was dropped is fetched again."""
    url = upload(endpoint, local, bucket, "prose")
    sizes = [info.bytes for info in open_stream(local / "train").manifest.shards]
    limit = sum(sizes) // 3
    expected = build_loader(loader_config(str(local), config(tmp_path)))
    loader = build_loader(loader_config(url, config(tmp_path, limit), workers))
    for here, there in zip(expected, loader, strict=True):
        np.testing.assert_array_equal(here["input_ids"], there["input_ids"])
        assert sum(file.stat().st_size for file in cached(tmp_path)) <= limit
    assert cached(tmp_path)


def test_the_next_blocks_are_fetched_ahead(endpoint: str, bucket: str, local: Path, tmp_path: Path) -> None:
    url = upload(endpoint, local, bucket, "prose")
    loader = build_loader(loader_config(url, config(tmp_path), lanes=1))
    batches = iter(loader)
    next(batches)
    opened = set(loader.dataset.streams[0]._open)
    end = time.monotonic() + 20
    while len(cached(tmp_path)) <= len(opened) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(cached(tmp_path)) > len(opened)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data, other: data[:-10], r"damaged: expected \d+ bytes with xxh3_64 [0-9a-f]+, found \d+ with"),
        (lambda data, other: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "damaged: expected .* found"),
        (lambda data, other: other, "damaged: expected .* found"),
        (lambda data, other: data + b"more", "damaged: expected .*, found more than"),
        (lambda data, other: None, "no such file|NO_SUCH_KEY|not exist"),
    ],
    ids=["truncated", "flipped", "foreign", "longer", "missing"],
)
def test_damage_on_the_server(
    endpoint: str, bucket: str, local: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    url = upload(endpoint, local, bucket, "prose")
    shards = open_stream(local / "train").manifest.shards
    data, other = ((local / "train" / info.file).read_bytes() for info in shards[1:3])
    changed = damage(data, other)
    key = f"prose/train/{shards[1].file}"
    if changed is None:
        client(endpoint).delete_object(Bucket=bucket, Key=key)
    else:
        client(endpoint).put_object(Bucket=bucket, Key=key, Body=changed)
    stream = open_stream(f"{url}/train", config(tmp_path))
    stream.document(0, 0)
    with pytest.raises(RunError, match=rf"stream 'prose': shard {url}/train/{shards[1].file}: ({message})") as caught:
        stream.document(1, 0)
    assert len(str(caught.value).splitlines()) == 1
    assert [file.name for file in cached(tmp_path)] == [shards[0].xxh3_64]
    if changed is None or len(changed) != len(data):
        with pytest.raises(RunError, match=rf"shard {url}/train/{shards[1].file}: is (missing|\d+ bytes long)"):
            stream.check_files()


@pytest.mark.parametrize("place", [3, -20])
def test_damage_in_the_cache_is_repaired(endpoint: str, bucket: str, local: Path, tmp_path: Path, place: int) -> None:
    """A flipped offset or token, or a cut file, of the copy: it is fetched again, once."""
    url = upload(endpoint, local, bucket, "prose")
    expected = open_stream(local / "train")
    first = open_stream(f"{url}/train", config(tmp_path))
    read_all(first)
    last = expected.manifest.shards[2].documents - 1
    copy = tmp_path / "cache" / expected.manifest.shards[2].xxh3_64
    data = bytearray(copy.read_bytes())
    data[place] ^= 2
    copy.write_bytes(data)
    stream = open_stream(f"{url}/train", config(tmp_path))
    np.testing.assert_array_equal(stream.document(2, last), expected.document(2, last))
    copy.write_bytes(copy.read_bytes()[:-30])
    stream = open_stream(f"{url}/train", config(tmp_path))
    np.testing.assert_array_equal(stream.document(2, last), expected.document(2, last))


def test_inspect(
    endpoint: str, bucket: str, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The default cache lies where XDG_CACHE_HOME says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    url = upload(endpoint, local, bucket, "prose")
    inspect(f"{url}/train")
    assert "400" in capsys.readouterr().out
    assert len([file for file in (tmp_path / "xdg" / "flexbert").iterdir() if file.is_file()]) > 10


def test_another_dataset_under_the_same_url(endpoint: str, bucket: str, local: Path, tmp_path: Path) -> None:
    url = upload(endpoint, local, bucket, "prose")
    read_all(open_stream(f"{url}/train", config(tmp_path)))
    other = write_stream(tmp_path / "other", "train", documents(9, 300, 200)).parent
    upload(endpoint, other, bucket, "prose")
    stream = open_stream(f"{url}/train", config(tmp_path))
    assert read_all(stream) == read_all(open_stream(other / "train"))


def test_plain_errors(endpoint: str, bucket: str, local: Path, tmp_path: Path) -> None:
    url = upload(endpoint, local, bucket, "prose")
    with pytest.raises(ConfigError, match=r"s3://.*/train: not a finished stream \(no stream.json\)"):
        open_stream(f"{url}/nothing/train", config(tmp_path))
    with pytest.raises(ConfigError, match="there is no bucket 'missing-bucket'|not a finished stream"):
        open_stream("s3://missing-bucket/prose/train", config(tmp_path))
    with pytest.raises(
        ConfigError, match=r"data.remote.cache_limit: 5,000 bytes cannot hold two of the largest shards"
    ):
        open_stream(f"{url}/train", config(tmp_path, 5000)).check_files()
    (tmp_path / "file").write_text("")
    wrong = RemoteConfig(cache=str(tmp_path / "file"), cache_limit=10**9)
    with pytest.raises(ConfigError, match="data.remote.cache: .*choose a folder that can be written"):
        open_stream(f"{url}/train", wrong).check_files()
    with pytest.raises(ConfigError, match="a package for gs:// is not installed|gcsfs"):
        open_stream("gs://bucket/prose/train", config(tmp_path))


class Flaky(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; fails the first requests of every shard with 503."""

    failures: ClassVar[Counter[str]] = Counter()
    limit = 2

    def do_GET(self) -> None:
        if self.path.endswith(".mds") and Flaky.failures[self.path] < Flaky.limit:
            Flaky.failures[self.path] += 1
            self.send_error(503)
            return
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def web(local: Path) -> Iterator[str]:
    Flaky.failures.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Flaky, directory=str(local)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_a_busy_server_is_asked_again(web: str, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.remote._FIRST_PAUSE", 0.01)
    stream = open_stream(f"{web}/train", config(tmp_path, retries=2))
    np.testing.assert_array_equal(stream.document(0, 0), open_stream(local / "train").document(0, 0))
    assert set(Flaky.failures.values()) == {2}
    Flaky.failures.clear()
    hasty = open_stream(f"{web}/train", config(tmp_path, retries=1))
    with pytest.raises(RunError, match=rf"stream 'prose': shard {web}/train/.*: 503"):
        hasty.document(1, 0)
    absent = Path(local / "train" / stream.manifest.shards[2].file)
    content = absent.read_bytes()
    absent.unlink()
    try:
        start = time.monotonic()
        monkeypatch.setattr("data.remote._FIRST_PAUSE", 30)
        Flaky.failures[f"/train/{absent.name}"] = 9
        with pytest.raises(RunError, match=rf"{absent.name}"):
            stream.document(2, 0)
        assert time.monotonic() - start < 10  # a file that is not there does not come with waiting
    finally:
        absent.write_bytes(content)


READER = """
import json, sys
from data.remote import RemoteConfig
from data.shards import open_stream
stream = open_stream(sys.argv[1], RemoteConfig(cache=sys.argv[2], cache_limit=int(sys.argv[3])))
for shard in json.loads(sys.argv[4]):
    stream.prefetch([shard])
    stream.document(shard, 0)
print("done")
"""


def reader(endpoint: str, url: str, tmp_path: Path, limit: int, shards: list[int]) -> "subprocess.Popen[str]":
    arguments = [sys.executable, "-c", READER, f"{url}/train", str(tmp_path / "cache"), str(limit), str(shards)]
    environment = {**os.environ, **NO_OTHER_S3, "AWS_ENDPOINT_URL": endpoint}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_processes_share_a_cache(endpoint: str, bucket: str, local: Path, tmp_path: Path) -> None:
    """Each shard is fetched once for all, while there is room; never above the limit when there is not."""
    url = upload(endpoint, local, bucket, "prose")
    count = len(open_stream(local / "train").manifest.shards)
    everything = [reader(endpoint, url, tmp_path, 10**9, list(range(count))) for _ in range(3)]
    for process in everything:
        out, error = process.communicate(timeout=120)
        assert (process.returncode, out.strip()) == (0, "done"), error
    assert len(cached(tmp_path)) == count
    limit = sum(file.stat().st_size for file in cached(tmp_path)) // 4
    for file in cached(tmp_path):
        file.unlink()
    rng = random.Random(1)
    crowd = [reader(endpoint, url, tmp_path, limit, rng.sample(range(count), count) * 2) for _ in range(3)]
    while any(process.poll() is None for process in crowd):
        try:
            total = sum(file.stat().st_size for file in cached(tmp_path))
        except FileNotFoundError:  # one was dropped between the listing and the look
            continue
        assert total <= limit
    for process in crowd:
        out, error = process.communicate()
        assert (process.returncode, out.strip()) == (0, "done"), error


def test_killed_readers_leave_nothing(endpoint: str, bucket: str, local: Path, tmp_path: Path) -> None:
    url = upload(endpoint, local, bucket, "prose")
    shards = open_stream(local / "train").manifest.shards
    limit = sum(info.bytes for info in shards) // 2
    order = list(range(len(shards))) * 40
    rng = random.Random(2)
    for _ in range(4):
        processes = [reader(endpoint, url, tmp_path, limit, order) for _ in range(2)]
        end = time.monotonic() + 60
        while not (tmp_path / "cache").is_dir() and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(rng.uniform(1.0, 2.5))
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.communicate()
        (tmp_path / "cache" / "partial-of-a-dead-process").write_bytes(b"x" * 1000)
    last = open_stream(f"{url}/train", config(tmp_path, limit))
    assert read_all(last) == read_all(open_stream(local / "train"))
    left = cached(tmp_path)
    assert sum(file.stat().st_size for file in left) <= limit
    assert {file.name for file in left} <= {info.xxh3_64 for info in shards}


@pytest.mark.parametrize(
    ("text", "size"),
    [("50gb", 50 * 10**9), ("1.5 TB", 1_500_000_000_000), ("64MiB", 64 * 2**20), ("10kb", 10_000), (7, 7), ("12", 12)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["50 gigs", "-1", "", "gb", True, 1.5])
def test_no_sizes(text: Any) -> None:
    with pytest.raises(ValueError, match="expected bytes such as 50gb"):
        parse_size(text)
