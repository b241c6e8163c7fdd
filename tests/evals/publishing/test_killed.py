"""A push that SIGKILL ends, at any moment: what can be seen of a revision is whole, and the next push makes up for it."""

import os
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


def check_whole(hub: Hub, repo: str, files: dict[str, dict[str, bytes]]) -> None:
    """What can be seen of a revision, and of main when there is something, is all of it."""
    if not (hub.folder / repo / "refs").is_dir():
        return
    for name in {*EXPORTS, "main"} & set(hub.branches(repo)):
        found = hub.files(repo, name)
        assert found == files[EXPORTS[3] if name == "main" else name] or (name == "main" and not found)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 20])
def test_a_push_that_is_killed_ends_with_every_revision_whole(
    finished: Path, tmp_path: Path, hub: Hub, pushes: Pushes, kills: int
) -> None:
    """At a random call, before it is done or before its answer comes; every third kill of the many at a random moment.
    A push that was not killed ends with all; the next one begins with an empty repository."""
    rng, killed, number = random.Random(kills), 0, 0
    run = shutil.copytree(finished, tmp_path / "run")
    base, calls, start = expected(run, "publish.repo=org/REPO"), hub.calls.total(), time.monotonic()
    code, text = pushes.push(str(run), "publish.repo=org/REPO")
    assert code == 0, text
    calls, seconds = hub.calls.total() - calls, time.monotonic() - start
    while killed < kills:
        number += 1
        repo, code = f"org/model-{kills}-{number}", -9
        files = {
            name: {path: data.replace(b"org/REPO", repo.encode()) for path, data in content.items()}
            for name, content in base.items()
        }
        while code and killed < kills:
            if kills > 3 and killed % 3 == 2:
                code, text = pushes.push(str(run), f"publish.repo={repo}", kill_after=rng.random() * seconds)
            else:
                call, done = rng.randrange(1, calls), rng.random() < 0.5
                strike = lambda pid, call=call, done=done: hub.strike(call, done, lambda: os.kill(pid, 9))  # noqa: E731
                code, text = pushes.push(str(run), f"publish.repo={repo}", started=strike)
                hub.strike(0, False, lambda: None)
            assert code in (0, -9), text
            killed += code == -9
            check_whole(hub, repo, files)
        code, text = pushes.push(str(run), f"publish.repo={repo}")
        assert code == 0, text
        assert set(hub.branches(repo)) == {*EXPORTS, "main"}
        check_whole(hub, repo, files)
        assert hub.files(repo, "main")
    commits = hub.calls["commit"]
    assert "nothing to do" in pushes.push(str(run), f"publish.repo={repo}")[1]
    assert hub.calls["commit"] == commits


@pytest.mark.slow
def test_a_hub_that_is_gone_for_a_while_gets_what_it_missed(
    finished: Path, tmp_path: Path, hub: Hub, pushes: Pushes
) -> None:
    """One line, exit code 1; the next push goes on where it failed, and uploads no weights twice."""
    run = shutil.copytree(finished, tmp_path / "run")
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
