"""Documents by a regular expression."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, model_validator

from data.preparation.filters.base import FILTERS, DocumentFilter
from flexbert_core.schema import Component


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}: {pattern!r}") from None
    return pattern


_Pattern = Annotated[str, AfterValidator(_check_pattern)]


@FILTERS.register("regex")
class Regex(DocumentFilter):
    """Keep documents in which `keep` is found, and in which `drop` is not (Python's `re`, searched anywhere)."""

    class Config(Component):
        name: Literal["regex"] = "regex"
        keep: _Pattern | None = None
        """A document must match it; null: any does."""
        drop: _Pattern | None = None
        """A document must not match it; null: none does."""

        @model_validator(mode="after")
        def _check(self) -> "Regex.Config":
            if self.keep is None and self.drop is None:
                raise ValueError("give keep, drop or both")
            return self

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.keep, self.drop = (None if text is None else re.compile(text) for text in (config.keep, config.drop))

    def keeps(self, text: str, columns: Mapping[str, Any]) -> bool:
        if self.keep is not None and not self.keep.search(text):
            return False
        return self.drop is None or not self.drop.search(text)
