"""Sources of documents, each in its own file; `SOURCES` names them."""

from data.preparation.sources import builtin, code, hf, jsonl, parquet, txt  # noqa: F401 (imported to be registered)
from data.preparation.sources.base import SOURCES, ColumnSource, DamagedError, LineError, Listing, Source, Unit
from data.preparation.sources.files import Fault, File

__all__ = ["SOURCES", "ColumnSource", "DamagedError", "Fault", "File", "LineError", "Listing", "Source", "Unit"]
