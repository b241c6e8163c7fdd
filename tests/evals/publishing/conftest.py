"""What tests of publishing share."""

from pathlib import Path

import pytest

from tests.helpers.in_process import go
from tests.helpers.publishing import write_run


@pytest.fixture(scope="session")
def finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with tests.helpers.publishing.EXPORTS; tests that publish it copy it first."""
    return go(write_run(tmp_path_factory.mktemp("finished"), tiny_data))
