"""Folders and URLs as targets: whole or not there, whatever happens in between."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data.store.transfer import Patience, TransferError
from evals.publishing.places import MANIFEST, FolderTarget, UrlTarget
from evals.publishing.revisions import Content
from evals.publishing.target import Target
from tests.helpers.servers import BUCKET, Bucket, Proxy

ONE: dict[str, Content] = {"config.json": b"{}", "model.safetensors": b"one" * 999, "1_Pooling/config.json": b"1"}
TWO: dict[str, Content] = {"config.json": b"{}", "model.safetensors": b"two" * 999, "more.txt": b"3"}


@pytest.fixture(params=["folder", "file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Callable[[], Target], Callable[[str], bytes | None]]:
    """A target, and a look at a file in it."""
    folder = tmp_path / "published"
    if request.param == "s3":
        bucket: Bucket = request.getfixturevalue("bucket")
        request.getfixturevalue("s3")
        prefix = tmp_path.name

        def look(name: str) -> bytes | None:
            try:
                return bucket.get(f"{prefix}/{name}")
            except bucket.client.exceptions.NoSuchKey:
                return None

        return lambda: UrlTarget(f"s3://{BUCKET}/{prefix}", Patience(2, 5)), look

    def read(name: str) -> bytes | None:
        return (folder / name).read_bytes() if (folder / name).is_file() else None

    made: Callable[[], Target] = (
        (lambda: FolderTarget(folder))
        if request.param == "folder"
        else (lambda: UrlTarget(f"file://{folder}", Patience(2, 5)))
    )
    return made, read


def test_revisions_lie_beside_one_another(place: tuple[Callable[[], Target], Callable[[str], bytes | None]]) -> None:
    make, look = place
    target = make()
    assert target.versions() == {}
    target.open()
    versions = {"tokens-1": target.push("tokens-1", ONE), "tokens-2-ema": target.push("tokens-2-ema", TWO)}
    versions["main"] = target.set_main("tokens-1", ONE)
    assert make().versions() == versions
    for name, files in (("tokens-1", ONE), ("tokens-2-ema", TWO)):
        assert {file: look(f"{name}/{file}") for file in files} == files
        manifest = json.loads(look(f"{name}/{MANIFEST}") or b"")
        assert {file: facts["bytes"] for file, facts in manifest["files"].items()} == {
            file: len(content) for file, content in files.items() if isinstance(content, bytes)
        }
    again = make()
    again.open()
    assert again.push("tokens-1", ONE) == versions["tokens-1"]
    changed = again.push("tokens-1", TWO)
    assert changed != versions["tokens-1"]
    assert make().versions()["tokens-1"] == changed
    assert look("tokens-1/more.txt") == b"3"
    assert look("tokens-1/1_Pooling/config.json") is None


def test_main_of_a_folder_loads_as_the_newest(tmp_path: Path) -> None:
    target = FolderTarget(tmp_path / "published")
    target.open()
    for name, files in (("tokens-1", ONE), ("tokens-2", TWO)):
        target.push(name, files)
        target.set_main(name, files)
    assert (tmp_path / "published/main/more.txt").read_bytes() == b"3"
    shutil.move(tmp_path / "published", tmp_path / "moved")
    assert (tmp_path / "moved/main/more.txt").read_bytes() == b"3"


def test_a_half_or_damaged_revision_is_none(tmp_path: Path) -> None:
    """In a folder only another hand can leave one: pushed again, it is whole."""
    folder = tmp_path / "published"
    for target in (FolderTarget(folder), UrlTarget(f"file://{folder}", Patience(0, 5))):
        target.open()
        version = target.push("tokens-1", ONE)
        for damage in (
            lambda: (folder / "tokens-1/model.safetensors").write_bytes(b"short"),
            lambda: (folder / "tokens-1/config.json").unlink(),
            lambda: (folder / "tokens-1" / MANIFEST).unlink(),
            lambda: (folder / "tokens-1" / MANIFEST).write_text("{"),
        ):
            damage()
            assert "tokens-1" not in target.versions()
            assert target.push("tokens-1", ONE) == version
            assert target.versions()["tokens-1"] == version
            assert (folder / "tokens-1/model.safetensors").read_bytes() == ONE["model.safetensors"]


def test_the_manifest_of_a_url_goes_first_and_comes_last(tmp_path: Path, proxy: Proxy, bucket: Bucket) -> None:
    """Pushing stops in the middle: the server refuses one file."""
    target = UrlTarget(f"s3://{BUCKET}/{tmp_path.name}", Patience(0, 5))
    target.open()
    target.push("tokens-1", ONE)
    proxy.misbehave = lambda request: (
        "403 Forbidden" if request.startswith("PUT") and "safetensors" in request else None
    )
    with pytest.raises(TransferError, match="refused"):
        target.push("tokens-1", TWO)
    proxy.misbehave = lambda request: None
    assert target.versions() == {}
    keys = [each["Key"] for each in bucket.client.list_objects_v2(Bucket=BUCKET, Prefix=tmp_path.name)["Contents"]]
    assert f"{tmp_path.name}/tokens-1/{MANIFEST}" not in keys
    assert target.push("tokens-1", TWO)
    assert "tokens-1" in target.versions()
