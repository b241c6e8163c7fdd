"""Where a run starts when it does not start from nothing: the run file's `from`."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from flexbert_core.schema import MAY_CHANGE, RunError, Schema, UserPath


class Origin(Schema):
    """A checkpoint to go on from, with other phases: a decay, a mixture, a learning rate with a warmup of its own."""

    checkpoint: UserPath = Field(
        min_length=1,
        description="runs/NAME/checkpoints/tokens-N; runs/NAME: its newest whole one; or a Hugging Face folder, such "
        "as an export, or a model of the hub, hf:ORG/NAME or hf:ORG/NAME@REVISION, which have weights only",
        json_schema_extra=MAY_CHANGE,  # read at the start only, which origin.json records
    )
    weights_only: bool | None = Field(
        default=None,
        description="a fresh optimizer and moving average, and the data from their beginning; default: false, of a "
        "Hugging Face folder true",
    )
    data: Literal["continue", "restart"] | None = Field(
        default=None,
        description="restart: the data from their beginning, which other streams, lanes or another seed need; default: "
        "continue, with weights only restart",
    )
    fresh_head: bool = Field(
        default=False,
        description="of a Hugging Face folder take the encoder alone, and draw the head for masked tokens anew, by "
        "`seed`: for encoders that have none",
        json_schema_extra=MAY_CHANGE,
    )

    @model_validator(mode="after")
    def _check_data(self) -> "Origin":
        if self.weights_only and self.data == "continue":
            raise ValueError("data: continue cannot hold with weights_only, where the data begin anew: leave one out")
        return self

    @property
    def meaning(self) -> tuple[bool, str]:
        """Of a checkpoint: whether only weights are taken, and what becomes of the data."""
        weights_only = bool(self.weights_only)
        return weights_only, self.data or ("restart" if weights_only else "continue")


def read_origin_record(folder: Path) -> dict[str, Any] | None:
    """What a run's origin.json says of where it started, None without one. folder: of the run. Raises RunError for a
    damaged one."""
    file = folder / "origin.json"
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text())
    except ValueError:
        record = None
    if not isinstance(record, dict) or not record.keys() >= {"from", "run", "tokens"}:
        raise RunError(f"{file}: damaged: take what it held from `origin` in a checkpoint's state.json")
    return record


def named_origin(node: Any) -> Any:
    """`from: FOLDER` says enough."""
    return {"checkpoint": node} if isinstance(node, str) else node
