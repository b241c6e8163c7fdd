"""The section `publish` of a run file: where a run's exports are pushed while it trains."""

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from flexbert_core.schema import Line, Schema, UserPath
from recipe.sections import writable_url

TARGETS = ("repo", "folder", "url")


class PublishConfig(Schema):
    """Each export becomes a revision of its own, `tokens-N`, of exactly one of repo, folder and url; `main` is the
    newest. A process of its own pushes them (`main.py publish RUN`), so that no step waits. No token stands here: it
    comes from the environment (HF_TOKEN, or `hf auth login`; the AWS variables)."""

    repo: Annotated[Line, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]{0,95}$")] | None = Field(
        default=None, description="org/name on the Hugging Face hub (HF_ENDPOINT says another one)"
    )
    folder: UserPath | None = Field(default=None, min_length=1, description="a local folder; needs no network")
    url: Annotated[Line, AfterValidator(writable_url)] | None = Field(
        default=None, description="s3://bucket/prefix, or a URL of fsspec that can be written to"
    )
    private: bool = Field(default=True, description="of a repo that is created; one that is there stays as it is")
    licence: Annotated[Line, Field(min_length=1, max_length=100)] | None = Field(
        default=None, description="`license` of the model card, such as apache-2.0; absent: the card names none"
    )
    language: list[Annotated[str, Field(pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]+)*$|^(code|multilingual)$")]] = Field(
        default=[], description="`language` of the model card: codes such as en"
    )

    @model_validator(mode="after")
    def _check_target(self) -> "PublishConfig":
        given = [key for key in TARGETS if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(TARGETS)}, got {' and '.join(given) or 'none'}")
        if self.folder is not None and "://" in self.folder:
            raise ValueError(f"folder: {self.folder}: is a URL: say url: {self.folder}")
        return self
