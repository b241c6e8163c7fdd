"""The hub as a target, against one that speaks its wire protocol over real HTTP."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from data.store.transfer import Patience, TransferError
from evals.publishing.hub import HubTarget
from evals.publishing.revisions import Content
from tests.helpers.hub import Hub, run_hub
from tests.helpers.servers import free_port

REPO = "org/model"
CARD = b"---\nlicense: mit\n---\n# A card\n"
ONE: dict[str, Content] = {"README.md": CARD, "config.json": b"{}", "model.safetensors": b"one" * 999, "a/b.json": b"1"}
TWO: dict[str, Content] = {"README.md": CARD + b"2", "config.json": b"{}", "model.safetensors": b"two" * 999, "c": b"3"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> Iterator[Hub]:
    with run_hub(tmp_path / "hub", token="secret") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)  # HF_ENDPOINT's, when the package was imported
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield hub


def target(retries: int = 4) -> HubTarget:
    return HubTarget(REPO, True, Patience(retries, 5))


def opened() -> HubTarget:
    made = target()
    made.open()
    return made


def test_each_revision_is_a_branch_and_main_is_the_newest(hub: Hub, tmp_path: Path) -> None:
    there = target()
    assert there.versions() == {}
    there.open()
    there.open()
    assert (hub.folder / REPO / "private").read_text() == "true"
    weights = tmp_path / "weights"
    weights.write_bytes(b"one" * 999)
    versions = {
        "tokens-1": there.push("tokens-1", {**ONE, "model.safetensors": weights}),
        "tokens-2": there.push("tokens-2", TWO),
        "main": there.set_main("tokens-2", TWO),
    }
    assert there.versions() == versions
    assert hub.files(REPO, "tokens-1") == ONE
    assert hub.files(REPO, "tokens-2") == TWO == hub.files(REPO, "main")
    assert hub.commits(REPO, "main") == ["tokens-2, by FlexBERT", "initial commit"]
    assert hub.commits(REPO, "tokens-2")[0] == "tokens-2, by FlexBERT"
    assert hub.calls["put"] == 2  # main's weights were there


def test_what_is_there_makes_no_commit(hub: Hub) -> None:
    for _ in range(2):
        there = opened()
        version = there.push("tokens-1", ONE)
        main = there.set_main("tokens-1", ONE)
        assert there.versions() == {"tokens-1": version, "main": main}
    assert hub.calls["commit"] == 2
    again = opened()
    assert again.push("tokens-1", TWO) != version
    assert hub.files(REPO, "tokens-1") == TWO
    assert hub.commits(REPO, "tokens-1")[0] == "tokens-1, by FlexBERT"


def test_a_file_that_is_written_again_is_pushed_again(hub: Hub, tmp_path: Path) -> None:
    """By one process, as after a rollback: an export of the same name has other weights of the same size."""
    weights, there = tmp_path / "weights", opened()
    for number, content in enumerate((b"one" * 999, b"two" * 999, b"six" * 999)):
        weights.write_bytes(content)
        card = CARD + str(number).encode()
        there.push("tokens-1", {**ONE, "README.md": card, "model.safetensors": weights})
        assert hub.files(REPO, "tokens-1") == {**ONE, "README.md": card, "model.safetensors": content}


def test_a_revision_is_whole_from_its_first_moment_on(hub: Hub) -> None:
    """Every call but the last is followed by a look from outside, at a repository whose main has another model."""
    there = opened()
    there.push("tokens-1", ONE)
    there.set_main("tokens-1", ONE)
    seen = []
    for kind in ("branch", "preupload", "put", "commit"):
        hub.before(kind, lambda: seen.append("tokens-2" in hub.branches(REPO)))
    there.push("tokens-2", TWO)
    assert seen == [False] * 4
    assert hub.files(REPO, "tokens-2") == TWO
    assert hub.files(REPO, "main") == ONE


@pytest.mark.parametrize("kind", ["create", "refs", "branch", "preupload", "batch", "put", "verify", "commit", "tree"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again(hub: Hub, kind: str, status: int) -> None:
    there = target()
    hub.fail(kind, status, times=2, Retry_After="0")
    there.open()
    there.push("tokens-1", ONE)
    there.set_main("tokens-1", ONE)
    assert hub.files(REPO, "tokens-1") == ONE == hub.files(REPO, "main")
    assert hub.calls["commit"] <= 4


@pytest.mark.parametrize("kind", ["create", "branch", "put", "commit"])
def test_an_answer_that_is_lost_repeats_nothing(hub: Hub, kind: str) -> None:
    """The call was done, and the client cannot know: its next one meets its own commit or branch."""
    there = target()
    hub.lose(kind)
    there.open()
    there.push("tokens-1", ONE)
    there.set_main("tokens-1", ONE)
    assert hub.files(REPO, "tokens-1") == ONE == hub.files(REPO, "main")
    assert hub.commits(REPO, "tokens-1") == ["tokens-1, by FlexBERT", "initial commit"]
    assert hub.commits(REPO, "main") == ["tokens-1, by FlexBERT", "initial commit"]


@pytest.mark.parametrize("branch", ["publishing", "tokens-1", "main"])
def test_a_commit_of_someone_else_is_seen(hub: Hub, branch: str) -> None:
    """Between our look and our commit: 412, another look, and theirs is gone from what is ours."""
    there = opened()
    if branch == "tokens-1":
        there.push("tokens-1", TWO)
    hub.calls.clear()
    if branch != "main":
        hub.before("commit", lambda: hub.commit_beside(REPO, branch, {"theirs": b"x", "config.json": b"0"}))
    there.push("tokens-1", ONE)
    if branch == "main":
        hub.before("commit", lambda: hub.commit_beside(REPO, branch, {"theirs": b"x", "config.json": b"0"}))
    there.set_main("tokens-1", ONE)
    assert hub.calls["commit"] == 3
    assert hub.files(REPO, "tokens-1") == ONE == hub.files(REPO, "main")
    assert "beside" in hub.commits(REPO, branch if branch != "publishing" else "tokens-1")


def test_a_branch_that_someone_else_makes_is_seen(hub: Hub) -> None:
    there = opened()
    hub.before("branch", lambda: opened().push("tokens-1", TWO))
    there.push("tokens-1", ONE)
    assert hub.files(REPO, "tokens-1") == ONE


def test_what_does_not_pass_is_said_at_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    there = opened()
    hub.calls.clear()
    hub.fail("commit", 403)
    with pytest.raises(TransferError, match=r"org/model: 403 .*: set HF_TOKEN") as refused:
        there.push("tokens-1", ONE)
    assert refused.value.kind == "denied"
    assert hub.calls["commit"] == 1
    hub.fail("commit", 503, times=9)
    with pytest.raises(TransferError, match="after 3 attempts") as busy:
        target(retries=2).push("tokens-1", ONE)
    assert busy.value.kind == "passing"
    assert "tokens-1" not in hub.branches(REPO)
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises(TransferError, match="set HF_TOKEN"):
        HubTarget("org/other", True, Patience(2, 5)).open()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TransferError, match="after 2 attempts") as gone:
        target(retries=1).versions()
    assert gone.value.kind == "passing"
