"""Fixtures of the data tests that need a server."""

from collections.abc import Iterator

import pytest

from tests.data.servers import Bucket, Proxy, run_moto, s3_environment


@pytest.fixture(scope="session")
def moto_server() -> Iterator[str]:
    """Endpoint of an S3 server."""
    with run_moto() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def bucket(moto_server: str) -> Bucket:
    """A bucket on it."""
    return Bucket(moto_server)


@pytest.fixture
def s3(moto_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment in which that server is S3."""
    for name, value in s3_environment(moto_server).items():
        monkeypatch.setenv(name, value)
    return moto_server


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The same, but all goes through a proxy."""
    proxy = Proxy(s3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.stop()
