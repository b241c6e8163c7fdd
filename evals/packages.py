"""Packages that evaluations need: whether they are here is said before anything is computed, and which ones computed it
is kept with each result."""

import importlib.util
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from flexbert_core.schema import ConfigError

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "scikit-learn", "sentence-transformers", "pylate")
# What is installed under another name than it is imported by.
_INSTALLED = {
    "fast_plaid": "fast-plaid",
    "pytrec_eval": "pytrec_eval-terrier",
    "sentence_transformers": "sentence-transformers",
    "sklearn": "scikit-learn",
}


def require(evaluation: str, packages: Sequence[str]) -> None:
    """Raise ConfigError when any of these modules is not here. They are not imported."""
    missing = [_INSTALLED.get(name, name) for name in dict.fromkeys(packages) if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{evaluation}: needs {', '.join(missing)}: make setup-eval")


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on, as far as they are here."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
