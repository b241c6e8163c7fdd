"""`evaluations: [detection]`: how well objective `rtd` tells replaced tokens of held-out text."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field

import ranks
from data.feed.batches import Batch
from data.feed.held_out import HeldOutRows, check_masking
from data.feed.loader import open_streams, tokenizer_folder
from data.feed.masking import DEFAULT, MASKINGS, MaskingConfig, has_one_rate, is_causal
from data.keyed import torch_seed
from data.store.shards import Stream
from flexbert import FlexBertForMaskedLM
from flexbert.dropout import TokenKeys, keyed_dropout
from flexbert_core.schema import Component
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from recipe.slots import EVALUATIONS
from training.objectives.rtd import ReplacedTokens, replace


def _hides(masking: MaskingConfig) -> MaskingConfig:
    """Raises ValueError for one that leaves the generator nothing to fill in, and for a schedule."""
    if is_causal(masking):
        raise ValueError(f"{masking.name!r} hides no token, so nothing is filled in: use tokens, words or spans")
    return has_one_rate(masking)


@EVALUATIONS.register("detection")
class Detection:
    """The generator fills in masked tokens of the validation split, the model tells which tokens are replaced: on the
    same rows, masks and draws every time. After steps of other objectives, in which generator and detector rest, it
    measures nothing."""

    class Config(Component):
        name: Literal["detection"] = "detection"
        max_seq_len: int | None = Field(default=None, ge=8, description="slots per row; default: the first phase's")
        max_rows: int | None = Field(default=None, ge=1, description="rows per stream at most; default: all")
        batch_size: int = Field(default=16, ge=1, description="rows per forward on each rank")
        masking: Annotated[Any, *MASKINGS.slot(default=DEFAULT), AfterValidator(_hides)] = Field(
            default={"name": "tokens", "rate": 0.15, "mask_fraction": 1.0, "random_fraction": 0.0},
            validate_default=True,
            description="which tokens the generator fills in (ELECTRA: 15 %, all of them [MASK])",
        )

    def __init__(
        self, config: Config, *, run: RunConfig, plan: PhasePlan, streams: Sequence[Stream], folder: Path
    ) -> None:
        """Raises ValueError for a run without objective `rtd`, ConfigError for a missing validation split, and for a
        masking that refuses the tokenizer."""
        if not any(isinstance(phase.objective, ReplacedTokens.Config) for phase in plan.phases):
            raise ValueError("detection: no phase has objective rtd, so nothing is detected: leave it out")
        self.config, self.plan = config, plan
        max_seq_len = config.max_seq_len or plan.phases[0].max_seq_len
        self.seed = torch_seed(run.seed, "validation")
        self.tokenizer = partial(tokenizer_folder, run.data)
        self.streams = open_streams(run.data, "validation")
        check_masking(self.streams, config.masking, self.tokenizer, f"evaluations: {config.name}")
        self.rows = [HeldOutRows(stream, max_seq_len, config.max_rows, self.seed) for stream in self.streams]

    @torch.no_grad()
    def run(self, model: FlexBertForMaskedLM, step: int) -> Mapping[str, Any]:
        """{"generator_loss": nats a masked token, "loss": nats a token of the detection, "accuracy", "precision",
        "recall": of tokens told replaced, "replaced": share of tokens}. None: of none. A collective over ranks."""
        if not isinstance(self.plan.at(max(step - 1, 0)).objective, ReplacedTokens.Config):
            return {}
        sums = torch.zeros(8, dtype=torch.float64)
        for number, rows in enumerate(self.rows):
            batches = rows.batches(
                self.config.batch_size, self.config.masking, self.tokenizer, ranks.rank(), ranks.world_size()
            )
            for turn, batch in enumerate(batches):
                # The place of the batch's first row in the stream: what is drawn does not depend on the ranks.
                first = (turn * ranks.world_size() + ranks.rank()) * self.config.batch_size
                sums += model.within(
                    lambda whole, batch=batch, first=first, number=number: self._sums(whole, batch, first, number)
                )
        restored, masked, detected, tokens, right, told, replaced, both = ranks.over_ranks(sums).tolist()
        return {
            "generator_loss": _share(restored, masked),
            "loss": _share(detected, tokens),
            "accuracy": _share(right, tokens),
            "precision": _share(both, told),
            "recall": _share(both, replaced),
            "replaced": _share(replaced, tokens),
        }

    def _sums(self, model: FlexBertForMaskedLM, batch: Batch, first_row: int, stream: int) -> torch.Tensor:
        device = model.encoder.token_table.device
        names = ("input_ids", "labels", "cu_seqlens", "row_bounds")
        batch = {**batch, **{name: batch[name].to(device) for name in names}}
        seed = torch_seed(self.seed, "replaced tokens", stream)
        with keyed_dropout(TokenKeys(seed, first_row, batch["row_bounds"], batch["tokens"])):
            found = replace(model, batch)
        told, replaced = found.logits > 0, found.is_replaced
        values = [
            found.scores.losses.double().sum(),
            batch["masked"],
            found.detection_loss(),
            batch["tokens"],
            (told == replaced).sum(),
            told.sum(),
            replaced.sum(),
            (told & replaced).sum(),
        ]
        return torch.tensor([float(value) for value in values], dtype=torch.float64)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
