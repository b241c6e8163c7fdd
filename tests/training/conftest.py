"""Fixtures of tests with many small runs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.conftest import bucket, moto_server, proxy, s3
from tests.training.ranks import Ranks
from tests.training.tiny import write_data

__all__ = ["bucket", "moto_server", "proxy", "s3"]  # fixtures: a real S3 server


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Starts runs of any number of ranks."""
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Streams for them."""
    return write_data(tmp_path_factory.mktemp("tiny"))
