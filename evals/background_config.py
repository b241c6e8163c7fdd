"""Options of the entry `eval` in a run file's `evaluations`."""

from typing import Literal

from pydantic import Field

from flexbert_core.schema import Component, Count


class BackgroundConfig(Component):
    """Evaluations of a run's checkpoints, in a process of their own."""

    name: Literal["eval"] = "eval"
    files: list[str] = Field(min_length=1, description="evaluations of configs/eval by name, or YAML files")
    set: list[str] = Field(
        default=[], description="values as on the command line: key=value, of several files NAME.key=value"
    )
    every: Count | None = Field(
        default=None,
        gt=0,
        description="tokens between checkpoints that are evaluated, and saved for it; default: milestones only, which "
        "always are",
    )
    gpus: list[str] = Field(
        default=[], description="GPUs that the process sees, as CUDA_VISIBLE_DEVICES has them; default: none, the CPU"
    )
    threads: int = Field(default=1, ge=1, description="cores that it computes with; training has precedence")
