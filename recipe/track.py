"""A track of speedruns: what has to be reached, on which text, with which machine."""

from pathlib import Path

from pydantic import Field

from flexbert_core.composing import load_node
from flexbert_core.schema import Schema, validate


class HeldOut(Schema):
    """How the held-out loss is measured: the same documents, pieces and hidden tokens for every run."""

    documents: int = Field(default=200, ge=2, description="of each stream's validation split at most, its first")
    tokens: int = Field(default=4096, ge=16, description="of a document at most, its first")
    max_seq_len: int = Field(default=256, ge=8, description="slots of a piece of a document")
    rate: float = Field(default=0.15, gt=0, le=1, description="share of tokens that are hidden, each by itself")
    seed: int = Field(default=0, ge=0, description="of the hidden tokens")


class Track(Schema):
    """`main.py speedrun verify` reads it: `configs/speedrun/track-*.yaml`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="of the track")
    target_loss: float = Field(gt=0, description="nats a hidden token, which the runs' mean must be under")
    held_out: HeldOut = Field(default=HeldOut(), description="how the loss is measured")
    cores: int | None = Field(default=None, ge=1, description="threads that a run may use at most; default: any")
    gpus: int = Field(default=0, ge=0, description="devices that a run may use at most")
    significance: float = Field(
        default=0.01, gt=0, lt=0.5, description="p under which the mean of the runs' losses is held to be under it"
    )
    streams: dict[str, str] = Field(
        min_length=1,
        description="name: fingerprint of the training split of every stream that may be trained on, as a run's "
        "ledger.jsonl and `speedrun verify` tell them",
    )
    validation: dict[str, str] = Field(
        min_length=1, description="name: fingerprint of the validation split that the loss is measured on"
    )


def load_track(path: str | Path) -> Track:
    """Raises ConfigError, one line per fault."""
    return validate(Track, load_node(path), path)
