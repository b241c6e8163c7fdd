"""Where revisions go: what a target can do, and which one a config names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from data.store.transfer import Patience
from evals.publishing.revisions import Content
from recipe.config import RunConfig

MAIN = "main"


class Target(Protocol):
    """A place of revisions. Methods raise TransferError, a folder's OSError; each may be killed at any moment, and
    called again."""

    where: str
    """For messages, and for publish.json."""

    def open(self) -> None:
        """Make it ready to be written to. Every other method but `versions` needs this."""
        ...

    def versions(self) -> dict[str, str]:
        """By its name the version of each revision that is there, whole, and of `main`. Empty where nothing is yet."""
        ...

    def push(self, name: str, files: Mapping[str, Content]) -> str:
        """Make the revision hold these files and no others, at once; nothing is done when it does. Returns its
        version."""
        ...

    def set_main(self, name: str, files: Mapping[str, Content]) -> str:
        """Make `main` that revision, which is there. Returns main's version."""
        ...


def open_target(config: RunConfig) -> Target:
    """The one that `publish` names; nothing is asked or written yet."""
    publish = config.publish
    assert publish is not None
    if publish.folder is not None:
        from evals.publishing.places import FolderTarget

        return FolderTarget(Path(publish.folder))
    patience = Patience(config.data.download_retries, config.data.download_timeout)
    if publish.url is not None:
        from evals.publishing.places import UrlTarget

        return UrlTarget(publish.url, patience)
    from evals.publishing.hub import HubTarget

    assert publish.repo is not None
    return HubTarget(publish.repo, publish.private, patience)
