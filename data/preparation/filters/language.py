"""Documents by the language that the source says they are in."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from data.preparation.filters.base import FILTERS, DocumentFilter
from flexbert_core.schema import Component


@FILTERS.register("language")
class Language(DocumentFilter):
    """Keep documents whose language column holds one of `keep`; a null is dropped. Nothing is detected here.

    With score_column, whose value must be a number, also those below min_score are dropped.
    """

    class Config(Component):
        name: Literal["language"] = "language"
        keep: list[str] = Field(min_length=1)
        """Languages that are kept, as the column spells them."""
        column: str = "language"
        """The column that holds the language."""
        score_column: str | None = None
        """The column that holds how sure that language is; needs min_score."""
        min_score: float | None = None
        """Documents with a lower score are dropped; needs score_column."""

        @model_validator(mode="after")
        def _check(self) -> "Language.Config":
            if (self.score_column is None) != (self.min_score is None):
                raise ValueError("score_column and min_score go together")
            return self

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.columns = [config.column] if config.score_column is None else [config.column, config.score_column]

    def keeps(self, text: str, columns: Mapping[str, Any]) -> bool:
        language = columns[self.config.column]
        if language is not None and not isinstance(language, str):
            raise ValueError(f"column {self.config.column!r} holds {type(language).__name__}, expected a string")
        if language not in self.config.keep or self.config.score_column is None:
            return language in self.config.keep
        score = columns[self.config.score_column]
        if isinstance(score, bool) or not isinstance(score, int | float | None):
            raise ValueError(f"column {self.config.score_column!r} holds {type(score).__name__}, expected a number")
        return score is not None and score >= self.config.min_score
