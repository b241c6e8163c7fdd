"""The sections of a run file that say how it runs: trainer, checkpoint, evaluation, ema."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from data.feed.masking import DEFAULT, MASKINGS, has_one_rate, has_own_rate
from data.store.transfer import is_url
from flexbert_core.schema import MAY_CHANGE, Count, Line, Schema
from recipe.slots import PARALLELISMS


class SpikeGuardConfig(Schema):
    """Rolls back when the loss jumps, and skips the steps that did it. `spike_guard: {}` switches it on."""

    sigmas: float = Field(default=6.0, gt=0, description="standard deviations over the running mean (OLMo-core: 6)")
    window: int = Field(default=128, ge=8, description="steps in mean and deviation; half of them must be there")
    skip: int = Field(
        default=16,
        ge=1,
        description="steps not trained on: the one that spiked and those before it (PaLM: 200 to 500, "
        "arXiv 2204.02311, section 5.1)",
    )

    @model_validator(mode="after")
    def _check_skip(self) -> "SpikeGuardConfig":
        if self.skip > self.window // 2:
            raise ValueError(f"skip of {self.skip} steps is over half the window of {self.window}: lower it")
        return self


def _parse_rows(value: Any) -> Any:
    if value in (None, "auto") or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"expected a number of rows, 1 or more, or auto, got {value!r}")


_Rows = Annotated[Annotated[int, Field(ge=1)] | Literal["auto"] | None, BeforeValidator(_parse_rows)]


_RANGE = r"^[1-9][0-9]*(-[1-9][0-9]*)?$"


def _parse_steps(value: Any) -> str:
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not re.fullmatch(_RANGE, text):
        raise ValueError(f"expected a step or a range of steps, such as 12000 or 12000-12040, got {value!r}")
    first, _, last = text.partition("-")
    if last and int(last) < int(first):
        raise ValueError(f"{text}: ends before it begins: write {last}-{first}")
    return text


_Steps = Annotated[str, BeforeValidator(_parse_steps)]


class TrainerConfig(Schema):
    """How steps are computed, and which are left out; nothing else here changes what is trained on."""

    precision: Literal["auto", "fp32", "amp_bf16"] = Field(
        default="auto",
        description="auto: bf16 on CUDA, else fp32; float32's products keep all bits on GPUs, too: there is no TF32",
    )
    parallelism: Annotated[Any, *PARALLELISMS.slot()] = Field(
        default="ddp",
        description="what each rank keeps of parameters and optimizer states: ddp all, fsdp2 its part",
        json_schema_extra=MAY_CHANGE,
    )
    microbatch_size: _Rows = Field(
        default=None,
        description="rows per forward-backward on each rank; default: all of a step's; auto: as many as fit, "
        "found for each row length before the first step, and the same on all ranks",
        json_schema_extra=MAY_CHANGE,  # with attention.probs_dropout other masks are drawn, as with other ranks
    )
    microbatch_tokens: Count | None = Field(
        default=None,
        gt=0,
        description="slots per forward-backward on each rank, in place of microbatch_size: as many rows as fit, "
        "1 at least, so that one number serves rows of all lengths (8 H100: 96K for a base model)",
        json_schema_extra=MAY_CHANGE,
    )
    compile: bool = Field(
        default=False,
        description="torch.compile each block; for CUDA: on the CPU it gains a few percent at most",
        json_schema_extra=MAY_CHANGE,
    )
    activation_checkpointing: int = Field(
        default=0,
        ge=0,
        description="every n-th block is computed again in backward, to save memory; 0: none is",
        json_schema_extra=MAY_CHANGE,
    )
    deterministic: bool | None = Field(
        default=None,
        description="the same bits again from the same state, where kernels and ranks allow it: attention's backward "
        "adds up in one order (at 8192 tokens a row up to a quarter slower), NCCL reduces without NVLS, and Inductor "
        "chooses no kernel by timing; default: true on one device, false on several",
        json_schema_extra=MAY_CHANGE,
    )
    gradient_clip_norm: float | None = Field(default=None, gt=0, description="global norm (ModernBERT: none)")
    log_interval: int = Field(
        default=10,
        ge=1,
        description="steps between lines of metrics.jsonl and the loggers",
        json_schema_extra=MAY_CHANGE,
    )
    max_bad_steps: int = Field(
        default=10,
        ge=1,
        description="steps in a row with a loss or gradient not finite (none applied) that end the run",
        json_schema_extra=MAY_CHANGE,
    )
    spike_guard: SpikeGuardConfig | None = Field(
        default=None,
        description="absent: off; {}: on, with its defaults",
        json_schema_extra=MAY_CHANGE,  # what it skipped is in the ledger, whatever it says now
    )
    skip_steps: list[_Steps] = Field(
        default=[],
        description="steps that are not trained, such as [12000-12040, 15001]: their rows are left out, all else stays "
        "as it is (PaLM, arXiv 2204.02311, section 5.1); of a begun run, steps to come",
        json_schema_extra=MAY_CHANGE,  # training/folder.py refuses a change of steps that are trained
    )
    hang_timeout: float = Field(
        default=1800.0,
        gt=0,
        description="seconds without a step (evaluation, save and export in it) that end the run; copies of "
        "checkpoints to and from checkpoint.remote count only while no byte comes through",
        json_schema_extra=MAY_CHANGE,
    )
    peak_flops: float | None = Field(
        default=None,
        gt=0,
        description="FLOP/s that one device can do at best, for mfu; default: flexbert.peaks by its name",
        json_schema_extra=MAY_CHANGE,
    )
    price_per_hour: float | None = Field(
        default=None,
        ge=0,
        description="of all machines together, in any currency: logs the cost so far and to the end",
        json_schema_extra=MAY_CHANGE,
    )

    @property
    def skipped(self) -> list[range]:
        """The steps of skip_steps, counted from 1 as in metrics.jsonl."""
        ends = [steps.split("-") for steps in self.skip_steps]
        return [range(int(each[0]), int(each[-1]) + 1) for each in ends]

    @model_validator(mode="after")
    def _check_microbatch(self) -> "TrainerConfig":
        if self.microbatch_tokens is not None and self.microbatch_size is not None:
            raise ValueError("microbatch_tokens: microbatch_size is given too, which says the same in rows: keep one")
        return self


def writable_url(url: str) -> str:
    """The URL itself. Raises ValueError for what is none, or cannot be written to."""
    if not is_url(url) or url.startswith(("http://", "https://")):
        raise ValueError(f"expected a URL that can be written to, such as s3://bucket/path, got {url!r}")
    return url


class CheckpointConfig(Schema):
    """When the state is saved. Milestones, one at the end of each phase, are kept for ever and exported."""

    interval: Count = Field(default=1_000_000_000, gt=0, description="tokens between checkpoints")
    keep: int = Field(default=2, ge=1, description="newest checkpoints kept besides those kept for ever")
    keep_every: Count | None = Field(default=None, gt=0, description="tokens between checkpoints kept for ever")
    keep_best: int = Field(
        default=0, ge=0, description="of the lowest validation loss, kept too; over 0: every evaluation is saved"
    )
    exports: Literal["milestones", "permanent"] | None = Field(
        default=None,
        description="what is exported, and what of ema: milestones, or permanent: also the weights of step 0 and every "
        "checkpoint that is kept for ever; default: milestones, with `publish` permanent",
    )
    max_failures: int = Field(
        default=3, ge=1, description="writes in a row that fail and end the run; before, training goes on without"
    )
    remote: Annotated[Line, AfterValidator(writable_url)] | None = Field(
        default=None,
        description="URL (s3://bucket/path, or of fsspec) where each checkpoint is copied, to URL/NAME; a run folder "
        "without one that is whole and as new fetches the newest",
    )


class HeldOutConfig(Schema):
    """On what the held-out loss is measured."""

    max_seq_len: int | None = Field(default=None, ge=8, description="slots per row; default: the first phase's")
    max_rows: int | None = Field(default=None, ge=1, description="rows per stream at most; default: all")
    batch_size: int = Field(default=16, ge=1, description="rows per forward on each rank", json_schema_extra=MAY_CHANGE)
    masking: Annotated[Any, *MASKINGS.slot(default=DEFAULT), AfterValidator(has_one_rate)] = Field(
        default={"rate": 0.15}, description="BERT's rate where it says none, whatever training uses"
    )

    @model_validator(mode="before")
    @classmethod
    def _inherit_rate(cls, node: Any) -> Any:
        if isinstance(node, dict) and isinstance(node.get("masking"), dict | str):
            given = {"name": node["masking"]} if isinstance(node["masking"], str) else node["masking"]
            if has_own_rate(str(given.get("name"))):
                return node
            return {**node, "masking": cls.model_fields["masking"].default | given}
        return node


class EvaluationConfig(HeldOutConfig):
    """Held-out loss and masked accuracy, per stream and over all, always on the same rows and masks."""

    interval: Count | None = Field(
        default=None, gt=0, description="tokens; absent: at milestones only", json_schema_extra=MAY_CHANGE
    )


class EmaConfig(Schema):
    """An exponential moving average of the weights, on when the run file has this section.

    It is saved, evaluated (validation_ema) and exported (exports/tokens-N-ema) beside the weights, and moves nothing.
    """

    decay: float = Field(gt=0, lt=1, description="share of itself that the average keeps at an update, such as 0.999")
    every: Count | None = Field(default=None, gt=0, description="tokens between updates; absent: after each step")
