"""What a web server does wrong is told apart: what may pass is tried again, what is refused is not called missing."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from data.inspect import inspect
from data.store.remote import RemoteFiles, fetch_tokenizer
from data.store.shards import open_stream
from flexbert_core.schema import ConfigError, RunError
from tests.helpers.remote import DOCUMENTS, assert_whole, settings
from tests.helpers.servers import Proxy, free_port, run_web

pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # fsspec's own session and loop
]
FAULTS = ["refuse", "503 Slow Down", "500 Internal Error", "429 Too Many Requests"]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@pytest.fixture
def faulty(web: str) -> Iterator[tuple[Proxy, str]]:
    """A proxy before the stream's web server, and the stream's URL behind it."""
    proxy = Proxy(web.removesuffix("/prose/train"))
    yield proxy, f"{proxy.endpoint}/prose/train"
    proxy.stop()


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_pass_are_tried_again(faulty: tuple[Proxy, str], tmp_path: Path, fault: str) -> None:
    """The first two requests of each kind for anything fail: for the manifest, for sizes, for shards."""
    proxy, url = faulty
    seen: dict[str, int] = {}

    def misbehave(request: str) -> str | None:
        seen[request] = seen.get(request, 0) + 1
        return fault if seen[request] <= 2 else None

    proxy.misbehave = misbehave
    stream = open_stream(url, settings(tmp_path, download_retries=2))
    stream.check_files()
    assert_whole(stream)
    assert min(seen.values()) >= 3


def test_a_stalled_answer_is_tried_again(faulty: tuple[Proxy, str], tmp_path: Path) -> None:
    proxy, url = faulty
    stream = open_stream(url, settings(tmp_path, download_timeout=0.5))
    file = stream.manifest.shards[0].file
    faults = iter(["stall"])
    proxy.misbehave = lambda request: next(faults, None) if request.startswith(f"GET /prose/train/{file}") else None
    np.testing.assert_array_equal(stream.document(0, 0), DOCUMENTS[0])
    assert len(proxy.gets(file)) == 2


EXPECTED = {
    "403 Forbidden": (1, "refused: 403 Forbidden: check your credentials"),
    "401 Unauthorized": (1, "refused: 401 Unauthorized: check your credentials"),
    "404 Not Found": (1, "no such file"),
    "503 Slow Down": (3, "the server answers 503 Slow Down (after 3 attempts)"),
}


@pytest.mark.parametrize("fault", EXPECTED)
def test_what_is_said_of_a_fault_that_stays(faulty: tuple[Proxy, str], tmp_path: Path, fault: str) -> None:
    """Of the manifest, of the sizes, of a shard."""
    (proxy, url), (attempts, message) = faulty, EXPECTED[fault]
    stream = open_stream(url, settings(tmp_path, download_retries=2))
    shard = stream.manifest.shards[0].file
    proxy.misbehave = lambda request: fault
    with pytest.raises((ConfigError, RunError)) as caught:
        open_stream(url, settings(tmp_path, download_retries=2))
    manifest = "holds no stream.json" if fault[:3] == "404" else f"/stream.json: {message}"
    assert manifest in str(caught.value)
    assert isinstance(caught.value, RunError if attempts > 1 else ConfigError)
    files = RemoteFiles(url, settings(tmp_path, download_retries=2))
    if fault[:3] == "404":
        assert files.sizes([shard]) == {}
    else:
        with pytest.raises(RunError if attempts > 1 else ConfigError) as caught:
            files.sizes([shard])
        assert str(caught.value) == f"{url}/{shard}: {message}"
    proxy.requests.clear()
    with pytest.raises(RunError) as caught:
        stream.document(0, 0)
    assert f"stream 'prose': shard {url}/{shard}: {message}" in str(caught.value)
    assert len(proxy.gets(shard)) == attempts


@pytest.mark.parametrize("host", [f"127.0.0.1:{free_port()}", "data.invalid"], ids=["refused", "unknown"])
def test_no_server(tmp_path: Path, host: str) -> None:
    with pytest.raises(RunError, match=rf"^http://{host}/x/stream.json: Cannot connect .*\(after 2 attempts\)$"):
        open_stream(f"http://{host}/x", settings(tmp_path, download_retries=1))


def test_through_a_proxy_of_the_environment(web: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The host is known to the proxy only."""
    monkeypatch.setenv("HTTP_PROXY", f"http://{urlsplit(web).netloc}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    stream = open_stream("http://data.invalid/prose/train", settings(tmp_path, download_retries=0))
    assert_whole(stream)


@pytest.mark.parametrize("name", TOKENIZER[1:])
def test_a_part_of_the_tokenizer_that_is_refused_is_not_left_out(tmp_path: Path, name: str) -> None:
    """Only one that is not there is."""
    for file in TOKENIZER:
        (tmp_path / file).write_text(file)
    with run_web(tmp_path) as endpoint:
        proxy = Proxy(endpoint)
        proxy.misbehave = lambda request: "403 Forbidden" if f"/{name} " in request else None
        with pytest.raises(ConfigError, match=rf"^{proxy.endpoint}/{name}: refused: 403 Forbidden"):
            fetch_tokenizer(proxy.endpoint, settings(tmp_path))
        proxy.misbehave = lambda request: "404 Not Found" if f"/{name} " in request else None
        copy = fetch_tokenizer(proxy.endpoint, settings(tmp_path))
        proxy.stop()
    assert sorted(file.name for file in copy.iterdir()) == sorted({*TOKENIZER} - {name})


def test_each_cache_has_its_own_copy_of_a_tokenizer(tmp_path: Path) -> None:
    for file in TOKENIZER:
        (tmp_path / file).write_text(file)
    with run_web(tmp_path) as endpoint:
        copies = [fetch_tokenizer(endpoint, settings(tmp_path / name)) for name in ("one", "two", "one")]
    assert [copy.is_relative_to(tmp_path / name) for copy, name in zip(copies, ("one", "two", "one"), strict=True)]
    assert copies[0] == copies[2] != copies[1]


def test_inspect_says_that_the_tokenizer_is_refused(faulty: tuple[Proxy, str], tmp_path: Path, capsys) -> None:
    proxy, url = faulty
    proxy.misbehave = lambda request: "403 Forbidden" if "tokenizer" in request else None
    inspect(url)
    assert "refused: 403 Forbidden" in " ".join(capsys.readouterr().out.split())
    proxy.misbehave = lambda request: None
    inspect(url)
    assert "not found beside the stream" in " ".join(capsys.readouterr().out.split())
