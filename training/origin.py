"""Where a run starts when it does not start from nothing: the run file's `from`."""

from typing import Any, Literal

from pydantic import Field

from schema import MAY_CHANGE, Schema, UserPath


class Origin(Schema):
    """A checkpoint to go on from, with other phases: a decay, a mixture, a learning rate with a warmup of its own."""

    checkpoint: UserPath = Field(
        min_length=1,
        description="runs/NAME/checkpoints/tokens-N; runs/NAME: its newest whole one; or a Hugging Face folder, such "
        "as an export, which has weights only",
        json_schema_extra=MAY_CHANGE,  # read at the start only, which origin.json records
    )
    weights_only: bool = Field(default=False, description="a fresh optimizer, and the data from their beginning")
    data: Literal["continue", "restart"] = Field(
        default="continue",
        description="restart: the data from their beginning, which other streams, lanes or another seed need",
    )


def named_origin(node: Any) -> Any:
    """`from: FOLDER` says enough."""
    return {"checkpoint": node} if isinstance(node, str) else node
