"""Slot `filter`: documents that are mostly letters."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from data.preparation.filters.base import FILTERS, DocumentFilter
from flexbert_core.schema import Component


@FILTERS.register("letters")
class Letters(DocumentFilter):
    """Keep documents in which at least a share of the characters are letters or blanks."""

    class Config(Component):
        name: Literal["letters"] = "letters"
        min_share: float = Field(0.8, ge=0, le=1, description="least share of letters and blanks")

    def keeps(self, text: str, columns: Mapping[str, Any]) -> bool:
        """Must depend on the arguments and the config alone: every worker asks it, in any order."""
        letters = sum(char.isalpha() or char.isspace() for char in text)
        return letters >= self.config.min_share * len(text)
