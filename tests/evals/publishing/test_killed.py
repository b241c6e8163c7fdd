"""A push that SIGKILL ends, at any moment: what can be seen of a revision is whole, and the next push makes up for it."""

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evals.publishing.revisions import find_revisions
from recipe.config import read_recorded_config
from tests.helpers.hub import LARGE, Hub, hub_environment, run_hub
from tests.helpers.publishing import EXPORTS, Pushes
from training.folder import RunFolder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with run_hub(tmp_path_factory.mktemp("hub"), token="secret") as hub:
        yield hub


@pytest.fixture(scope="module")
def pushes(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushes]:
    pushes = Pushes(hub_environment(hub, tmp_path_factory.mktemp("home"), token="secret"))
    yield pushes
    pushes.close()


def expected(run: Path, to: str) -> dict[str, dict[str, bytes]]:
    config = read_recorded_config(run / "config.yaml", [to])
    return {
        each.name: {
            name: content if isinstance(content, bytes) else content.read_bytes()
            for name, content in each.files().items()
        }
        for each in find_revisions(RunFolder(run), config)
    }


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_push_that_is_killed_ends_with_every_revision_whole(
    finished: Path, tmp_path: Path, hub: Hub, pushes: Pushes, kills: int
) -> None:
    """At random moments of a push that takes as long as the first, whole one. Each kill falls on another repository's
    or the same one's push, so that the later ones meet what the earlier ones left."""
    rng, killed = random.Random(kills), 0
    run = shutil.copytree(finished, tmp_path / "run")
    hub.delay = 0.01
    start = time.monotonic()
    code, text = pushes.push(str(run), f"publish.repo=org/whole-{kills}")
    whole = time.monotonic() - start
    assert code == 0, text
    number = 0
    while killed < kills:
        number += 1
        repo = f"org/model-{kills}-{number}"
        to = f"publish.repo={repo}"
        files = expected(run, to)
        (run / "publish.json").unlink(missing_ok=True)
        while killed < kills:
            code, text = pushes.push(str(run), to, kill_after=rng.random() * whole)
            if code == 0:
                break
            assert code == -9, text
            killed += 1
            if (hub.folder / repo / "refs").is_dir():
                for name in set(hub.branches(repo)) & set(EXPORTS):
                    assert hub.files(repo, name) == files[name]
                if "main" in hub.branches(repo) and hub.files(repo, "main"):
                    assert hub.files(repo, "main") == files[EXPORTS[3]]
        code, text = pushes.push(str(run), to)
        assert code == 0, text
        assert set(hub.branches(repo)) == {*EXPORTS, "main"}
        for name in EXPORTS:
            assert hub.files(repo, name) == files[name]
        assert hub.files(repo, "main") == files[EXPORTS[3]]
        commits = hub.calls["commit"]
        assert "nothing to do" in pushes.push(str(run), to)[1]
        assert hub.calls["commit"] == commits


def test_a_hub_that_is_gone_for_a_while_gets_what_it_missed(
    finished: Path, tmp_path: Path, hub: Hub, pushes: Pushes
) -> None:
    """One line, exit code 1; the next push goes on where it failed, and uploads no weights twice."""
    run = shutil.copytree(finished, tmp_path / "run")
    hub.delay = 0.0
    to = ["publish.repo=org/gone"]
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("download_retries: 8", "download_retries: 1"))
    hub.before("put", lambda: hub.fail("commit", 503, times=2, Retry_After="0"))
    puts = hub.calls["put"]
    code, text = pushes.push(str(run), *to)
    assert code == 1, text
    line = text.splitlines()[-1]
    assert line.startswith(f"error: {hub.endpoint}/org/gone: 503 ")
    assert line.endswith("(after 2 attempts)")
    assert pushes.push(str(run), *to)[0] == 0
    assert set(hub.branches("org/gone")) == {*EXPORTS, "main"}
    contents = {data for name in EXPORTS for path, data in hub.files("org/gone", name).items() if path.endswith(LARGE)}
    assert hub.calls["put"] - puts == len(contents)
