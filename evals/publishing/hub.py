"""The Hugging Face hub as a target, by huggingface_hub: a revision is a branch.

A branch is made at a commit that has all of its files, so it is whole from its first moment on: they are committed to
a branch of another name before, which is no revision and is removed. A branch that is there changes by one commit.
Every commit names its parent, so that one of another process in between is seen (412), read, and built upon. The
client retries only what it uploads; commits, branches and questions are retried here.

HF_ENDPOINT names another hub. The token is HF_TOKEN's, or that of `hf auth login`.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

# Before huggingface_hub is imported: its uploader for "xet" resumes nothing that is of use here, and is a binary of its
# own that knows neither our timeouts nor proxies.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from data.store.transfer import Patience, TransferError, with_retries
from evals.publishing.revisions import Content
from evals.publishing.target import MAIN

log = logging.getLogger(__name__)

T = TypeVar("T")

_STAGE = "publishing"  # the branch that new revisions are committed to first
_PASSING = (408, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 300.0  # seconds, of what a 429's Retry-After may ask for: the hub counts in windows of five minutes
_CONFLICTS = 8  # in a row, of one commit
_OWN_FILES = {".gitattributes"}  # of the hub's first commit; not ours to remove


class _ConflictError(Exception):
    """Someone else was faster."""


class HubTarget:
    """A model repository."""

    def __init__(self, repo: str, private: bool, patience: Patience) -> None:
        from huggingface_hub import HfApi, constants

        self.repo, self.private, self.patience = repo, private, patience
        self.where = f"{constants.ENDPOINT}/{repo}"
        if constants.HF_HUB_OFFLINE:
            raise TransferError("denied", f"{self.where}: HF_HUB_OFFLINE is set: unset it to publish there")
        self.api = HfApi()
        self._digests: dict[tuple[Any, ...], str] = {}

    def open(self) -> None:
        self._call(partial(self.api.create_repo, self.repo, private=self.private, exist_ok=True))

    def versions(self) -> dict[str, str]:
        try:
            return self._heads()
        except TransferError as error:
            if error.kind == "missing":  # no repository yet
                return {}
            raise

    def push(self, name: str, files: Mapping[str, Content]) -> str:
        for _ in range(_CONFLICTS):
            try:
                heads = self._heads()
                if name in heads:
                    return self._commit(name, files, heads[name], name)
                if _STAGE not in heads:
                    self._branch(_STAGE, heads[MAIN])
                    heads[_STAGE] = heads[MAIN]
                commit = self._commit(_STAGE, files, heads[_STAGE], name)
                self._branch(name, commit)
                return commit
            except _ConflictError as conflict:
                log.info("%s: %s: looking again", self.where, conflict)
        raise TransferError("passing", f"{self.where}: {name}: another process keeps changing it")

    def set_main(self, name: str, files: Mapping[str, Content]) -> str:
        for _ in range(_CONFLICTS):
            try:
                heads = self._heads()
                commit = self._commit(MAIN, files, heads[MAIN], name)
                if _STAGE in heads:
                    self._remove_stage()
                return commit
            except _ConflictError as conflict:
                log.info("%s: %s: looking again", self.where, conflict)
        raise TransferError("passing", f"{self.where}: {MAIN}: another process keeps changing it")

    def _heads(self) -> dict[str, str]:
        refs = self._call(partial(self.api.list_repo_refs, self.repo))
        return {branch.name: branch.target_commit for branch in refs.branches}

    def _branch(self, name: str, commit: str) -> None:
        self._call(partial(self.api.create_branch, self.repo, branch=name, revision=commit))

    def _remove_stage(self) -> None:
        try:
            self._call(partial(self.api.delete_branch, self.repo, branch=_STAGE))
        except (TransferError, _ConflictError) as error:  # it harms nobody, and the next push finds it
            log.info("%s: branch %s is left: %s", self.where, _STAGE, error)

    def _commit(self, branch: str, files: Mapping[str, Content], head: str, name: str) -> str:
        """One commit that makes the branch hold these files and no others; none when it does. Returns its head."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        there = self._tree(head)
        changed = [path for path, content in files.items() if not self._is(content, there.get(path))]
        gone = [path for path in there if path not in files and path not in _OWN_FILES]
        if not changed and not gone:
            return head

        def attempt() -> str:
            operations: list[Any] = [CommitOperationDelete(path) for path in gone]
            for path in changed:
                content = files[path]
                operations.append(CommitOperationAdd(path, content if isinstance(content, bytes) else str(content)))
            message = f"{name}, by FlexBERT"
            done = self.api.create_commit(
                self.repo, operations, commit_message=message, revision=branch, parent_commit=head
            )
            return str(done.oid)

        return self._call(attempt)

    def _tree(self, commit: str) -> dict[str, tuple[str, bool]]:
        """By path the hash of each file, and whether that is of a large one (sha256, else git's sha1)."""

        def attempt() -> dict[str, tuple[str, bool]]:
            entries = self.api.list_repo_tree(self.repo, recursive=True, revision=commit)
            files = [entry for entry in entries if hasattr(entry, "blob_id")]  # others are folders
            return {
                file.path: (file.blob_id, False) if file.lfs is None else (file.lfs.sha256, True)  # pyright: ignore
                for file in files
            }

        return self._call(attempt)

    def _is(self, content: Content, there: tuple[str, bool] | None) -> bool:
        if there is None:
            return False
        wanted, large = there
        data = content if isinstance(content, bytes) else None
        facts = None if data is not None else content.stat()  # pyright: ignore
        # An export may be written again while this process lives: after a rollback its name has other weights.
        key = (content, facts and (facts.st_size, facts.st_mtime_ns), large)
        if key not in self._digests:
            size = len(data) if data is not None else facts.st_size  # pyright: ignore
            digest = hashlib.sha256() if large else hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
            if data is not None:
                digest.update(data)
            else:
                with content.open("rb") as file:  # pyright: ignore
                    while block := file.read(1 << 20):
                        digest.update(block)
            self._digests[key] = digest.hexdigest()
        return self._digests[key] == wanted

    def _call(self, attempt: Callable[[], T]) -> T:
        """With retries. Raises TransferError, or _ConflictError when the parent is another by now or the name is
        taken."""
        return with_retries(partial(self._plain, attempt), self.patience)

    def _plain(self, attempt: Callable[[], T]) -> T:
        import requests

        try:
            return attempt()
        except (TransferError, FileNotFoundError):
            raise
        except (requests.RequestException, OSError, RuntimeError, ValueError) as error:
            cause: BaseException = error
            while not isinstance(cause, requests.RequestException) and cause.__cause__ is not None:
                cause = cause.__cause__  # a failed upload is a RuntimeError
            response = getattr(cause, "response", None)
            status = 0 if response is None else int(response.status_code)
            said = f"{self.where}: {status or ''} {getattr(cause, 'server_message', None) or _first_line(cause)}"
            said = " ".join(said.split())[:400]
            if status in (409, 412):
                raise _ConflictError(f"{status}: {_first_line(cause)}") from None
            if status == 404:
                raise TransferError("missing", f"{said}: no such repository, or not for this token") from None
            if status in (401, 403):
                fix = "set HF_TOKEN to one that may write there, or `hf auth login`"
                raise TransferError("denied", f"{said}: {fix}") from None
            if status in _PASSING or (status == 0 and isinstance(cause, requests.RequestException | OSError)):
                self._wait_as_asked(response)
                raise TransferError("passing", said) from None
            raise TransferError("denied", said) from None

    @staticmethod
    def _wait_as_asked(response: Any) -> None:
        asked = "" if response is None else response.headers.get("Retry-After", "")
        if asked.isdecimal():
            time.sleep(min(float(asked), _LONGEST_WAIT))


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")[:300]
