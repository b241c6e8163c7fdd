"""Folders and URLs as targets: PLACE/tokens-N/ is a revision, and its manifest.json says what makes it whole.

| | a revision appears | main |
|---|---|---|
| folder | by being renamed to its name | `main`, a symbolic link to the newest |
| URL | with its manifest, which is written last and deleted first | main.json: {"revision": "tokens-N"} |
"""

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from data.store.transfer import Patience, TransferError, open_store, with_retries
from evals.publishing.revisions import Content
from evals.publishing.target import MAIN
from flexbert_core.durable import UNFINISHED, new_folder, remove_unfinished, sync

MANIFEST = "manifest.json"
MAIN_FILE = "main.json"
_REVISION = re.compile(r"tokens-\d+(-ema)?")
_BLOCK = 1 << 20


class FolderTarget:
    """A local folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.where = folder, str(folder)

    def open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.folder)

    def versions(self) -> dict[str, str]:
        found = {}
        for path in self.folder.glob("tokens-*") if self.folder.is_dir() else ():
            if _REVISION.fullmatch(path.name) and self._is_whole(path):
                found[path.name] = _version((path / MANIFEST).read_bytes())
        main = self.folder / MAIN
        if main.is_symlink() and main.exists():
            found[MAIN] = str(main.readlink())
        return found

    def push(self, name: str, files: Mapping[str, Content]) -> str:
        path, manifest = self.folder / name, manifest_of(files)
        if self._is_whole(path) and (path / MANIFEST).read_bytes() == manifest:
            return _version(manifest)
        with new_folder(path) as beside:
            for file, content in {**files, MANIFEST: manifest}.items():
                (beside / file).parent.mkdir(parents=True, exist_ok=True)
                with (beside / file).open("wb") as out:
                    for block in _blocks(content):
                        out.write(block)
        return _version(manifest)

    def set_main(self, name: str, files: Mapping[str, Content]) -> str:
        main, beside = self.folder / MAIN, self.folder / (UNFINISHED + MAIN)
        beside.unlink(missing_ok=True)
        beside.symlink_to(name)
        os.replace(beside, main)  # noqa: PTH105  Path.replace would do the same
        sync(self.folder)
        return name

    @staticmethod
    def _is_whole(path: Path) -> bool:
        try:
            sizes = _sizes((path / MANIFEST).read_bytes())
            return bool(sizes) and all((path / file).stat().st_size == size for file, size in sizes.items())
        except (OSError, ValueError, KeyError, TypeError):
            return False


class UrlTarget:
    """Behind a URL: S3, or what fsspec writes to."""

    def __init__(self, url: str, patience: Patience) -> None:
        self.where, self.patience = url.rstrip("/"), patience

    def open(self) -> None:
        self._store = open_store(self.where, self.patience)

    def versions(self) -> dict[str, str]:
        self.open()
        sizes, found = self._files(), {}
        for name in {file.partition("/")[0] for file in sizes}:
            if _REVISION.fullmatch(name) and f"{name}/{MANIFEST}" in sizes:
                manifest = self._read(f"{name}/{MANIFEST}")
                if _complete(manifest, name, sizes):
                    found[name] = _version(manifest)
        if MAIN_FILE in sizes:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged one is written anew
                found[MAIN] = str(json.loads(self._read(MAIN_FILE))["revision"])
        return found

    def push(self, name: str, files: Mapping[str, Content]) -> str:
        manifest, there = manifest_of(files), self._files()
        last = f"{name}/{MANIFEST}"
        if last in there:
            before = self._read(last)
            if before == manifest and _complete(before, name, there):
                return _version(manifest)
            with_retries(partial(self._store.remove, last), self.patience)
        for file, content in {**files, MANIFEST: manifest}.items():  # the manifest is the last
            self._write(f"{name}/{file}", content)
        for file in there:
            if file.startswith(f"{name}/") and file != last and file.removeprefix(f"{name}/") not in files:
                with_retries(partial(self._store.remove, file), self.patience)
        return _version(manifest)

    def set_main(self, name: str, files: Mapping[str, Content]) -> str:
        self._write(MAIN_FILE, (json.dumps({"revision": name}) + "\n").encode())
        return name

    def _files(self) -> dict[str, int | None]:
        try:
            return self._store.sizes([])
        except TransferError as error:
            if error.kind == "missing":
                return {}
            raise

    def _read(self, name: str) -> bytes:
        return with_retries(lambda: b"".join(map(bytes, self._store.blocks(name))), self.patience)

    def _write(self, name: str, content: Content) -> None:
        def attempt() -> None:
            with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
                self._store.write(name, file)

        with_retries(attempt, self.patience)


def manifest_of(files: Mapping[str, Content]) -> bytes:
    """Bytes and sha256 of each file, as JSON."""
    node = {}
    for name, content in sorted(files.items()):
        digest, size = hashlib.sha256(), 0
        for block in _blocks(content):
            digest.update(block)
            size += len(block)
        node[name] = {"bytes": size, "sha256": digest.hexdigest()}
    return (json.dumps({"files": node}, indent=1) + "\n").encode()


def _blocks(content: Content) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _sizes(manifest: bytes) -> dict[str, int]:
    return {name: int(facts["bytes"]) for name, facts in json.loads(manifest)["files"].items()}


def _complete(manifest: bytes, name: str, there: Mapping[str, int | None]) -> bool:
    """Whether all files of a manifest are there, of the right size where the server says one."""
    try:
        return all(there.get(f"{name}/{file}", -1) in (size, None) for file, size in _sizes(manifest).items())
    except (ValueError, KeyError, TypeError):
        return False


def _version(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()[:16]
