"""Documents by length."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from data.preparation.filters.base import FILTERS, DocumentFilter
from flexbert_core.schema import Component


@FILTERS.register("length")
class Length(DocumentFilter):
    """Keep documents of min_characters to max_characters, both included.

    In characters (Unicode code points), which are known before there is a tokenizer; a token of English text is about
    four. A run can still choose by tokens from the same shards.
    """

    class Config(Component):
        name: Literal["length"] = "length"
        min_characters: int = Field(0, ge=0)
        """Shorter documents are dropped."""
        max_characters: int | None = Field(None, ge=1)
        """Longer documents are dropped; null: none is too long."""

        @model_validator(mode="after")
        def _check(self) -> "Length.Config":
            if self.max_characters is not None and self.max_characters < self.min_characters:
                raise ValueError(f"max_characters ({self.max_characters}) is below min_characters")
            if self.max_characters is None and self.min_characters == 0:
                raise ValueError("give min_characters, max_characters or both")
            return self

    def keeps(self, text: str, columns: Mapping[str, Any]) -> bool:
        longest = self.config.max_characters
        return len(text) >= self.config.min_characters and (longest is None or len(text) <= longest)
