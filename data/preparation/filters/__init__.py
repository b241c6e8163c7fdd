"""Filters of documents, each in its own file; `FILTERS` names them."""

from data.preparation.filters import language, length, minhash, regex  # noqa: F401 (imported to be registered)
from data.preparation.filters.base import FILTERS, DocumentFilter, StreamFilter

__all__ = ["FILTERS", "DocumentFilter", "StreamFilter"]
