"""From documents to packed, masked batches. These names are the package's public face, imported on first use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.feed.loader import MixtureDataset, build_loader
    from data.preparation.dataset import prepare

__all__ = ["MixtureDataset", "build_loader", "prepare"]

_HOMES = {
    "MixtureDataset": "data.feed.loader",
    "build_loader": "data.feed.loader",
    "prepare": "data.preparation.dataset",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'data' has no attribute {name!r}")
