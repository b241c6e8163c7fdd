"""Settings and fixtures of all tests."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from data.store import transfer
from tests.helpers.process import BEFORE_TESTS, OF_LAUNCHERS, quicken_runs
from tests.helpers.ranks import Ranks, shared_ranks
from tests.helpers.registries import registries_as_before
from tests.helpers.remote import DOCUMENTS
from tests.helpers.servers import Bucket, Proxy, run_moto, run_web, s3_environment
from tests.helpers.synthetic import write_stream
from tests.helpers.tiny import write_data
from tests.helpers.users import folder_of_all

# The same examples at every run: a run of the tests says something about the code, not about the day's luck.
# HYPOTHESIS_PROFILE=explore looks for new ones.
# No example is too slow: machines are shared, and time is measured in benchmarks/.
_TIMELESS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", derandomize=True, print_blob=True, **_TIMELESS)
settings.register_profile("explore", print_blob=True, **_TIMELESS)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_collection_finish() -> None:
    BEFORE_TESTS.update(os.environ)
    quicken_runs()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """How a worker of xdist died; the line of xdist says only that it did."""
    if error:
        sys.stderr.write(f"\n{node.gateway.id}: exit code {node.gateway._io.popen.wait(30)}\n")


@pytest.fixture(autouse=True, scope="module")
def _registries_of_a_file() -> Iterator[None]:
    """What a test file registers in this process is of no concern to the files that come later."""
    with registries_as_before():
        yield


@pytest.fixture(autouse=True)
def _signals_of_a_test() -> Iterator[None]:
    """A command that a test runs in this process leaves it as one that ends: SIGTERM ignored, by its children too."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        if handler is not None:  # one that Python did not set
            signal.signal(number, handler)


@contextmanager
def _environment_as_before() -> Iterator[None]:
    """A later test's commands would run with the variables that a command leaves. Those of a process group and of
    Ray stay as long as what they tell of."""
    before = dict(os.environ)
    yield
    for name in {name for name, _ in os.environ.items() ^ before.items()}:
        if name.startswith(("PYTEST_", "RAY_", *OF_LAUNCHERS)):
            continue
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


@pytest.fixture(autouse=True, scope="module")
def _environment_of_a_file() -> Iterator[None]:
    with _environment_as_before():
        yield


@pytest.fixture(autouse=True)
def _environment_of_a_test() -> Iterator[None]:
    with _environment_as_before():
        yield


@pytest.fixture(autouse=True)
def _nothing_watches_on() -> Iterator[None]:
    """A watchdog that a run in this process leaves behind would end the process half an hour later, silently."""
    yield
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may work in."""
    with folder_of_all() as folder:
        yield folder


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


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stream of tests.helpers.remote.DOCUMENTS."""
    return write_stream(tmp_path_factory.mktemp("remote") / "prose", "train", DOCUMENTS)


@pytest.fixture(scope="session")
def url(local: Path, bucket: Bucket) -> str:
    """The stream on S3; tests that damage it make their own."""
    return bucket.upload(local, "whole/prose/train")


@pytest.fixture
def own(local: Path, bucket: Bucket, tmp_path: Path) -> str:
    """A copy on S3 that the test may damage."""
    return bucket.upload(local, f"{tmp_path.name}/prose/train")


@pytest.fixture
def web(local: Path) -> Iterator[str]:
    """The stream on a plain web server."""
    with run_web(local.parent.parent) as endpoint:
        yield f"{endpoint}/prose/train"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed request is repeated at once."""
    monkeypatch.setattr(transfer, "FIRST_DELAY", 0.02)


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    """Starts runs of any number of ranks."""
    return shared_ranks()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Streams for them."""
    return write_data(tmp_path_factory.mktemp("tiny"))
