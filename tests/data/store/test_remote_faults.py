"""What the server of a stream does wrong: tried again where it may pass, else one plain line.

The servers, the sockets and the processes are real.
"""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data.store.shards import open_stream
from flexbert_core.schema import RunError
from tests.helpers.remote import DOCUMENTS, assert_whole, flip, in_fresh_process, key, settings, shards_in
from tests.helpers.servers import BUCKET, Bucket, Proxy, free_port

pytestmark = pytest.mark.usefixtures("quick")


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
    bucket.put(key(own, file), flip(content))

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
    in_fresh_process(f"assert open_stream({url!r}, CacheConfig(cache={str(tmp_path)!r})).manifest.documents == 300")


def test_no_credentials(
    proxy: Proxy, own: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Public files need none; where they are not public, that is said."""
    file = key(own, "stream.json")
    bucket.client.put_object_acl(Bucket=BUCKET, Key=file, ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    code = f"print(open_stream({own!r}, CacheConfig(cache={str(tmp_path)!r})).manifest.documents)"
    assert in_fresh_process(code) == "300\n"
    bucket.client.put_object_acl(Bucket=BUCKET, Key=file, ACL="private")
    caught = f"""
try:
    {code}
except ConfigError as error:
    print(error)
"""
    assert "no credentials are set: give AWS_ACCESS_KEY_ID" in in_fresh_process(caught)


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
