"""An evaluation from outside the project: how alike the mean hidden states of held-out rows are.

imports: [mean_similarity.py]
evaluations: [{name: mean_similarity, rows: 64}]
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

import ranks
from data.feed.held_out import HeldOutRows
from data.feed.loader import open_streams, tokenizer_folder
from data.store.shards import Stream
from flexbert import FlexBertForMaskedLM
from flexbert_core.schema import Component
from recipe.config import RunConfig
from recipe.phases import PhasePlan
from recipe.slots import EVALUATIONS


@EVALUATIONS.register("mean_similarity")
class MeanSimilarity:
    """Mean cosine between the documents of a stream, each the mean of its hidden states: near 1, the model tells
    documents apart badly (anisotropy, arXiv 1909.00512)."""

    class Config(Component):
        rows: int = Field(64, ge=1, description="rows of each stream, over all ranks")

    def __init__(
        self, config: Config, *, run: RunConfig, plan: PhasePlan, streams: Sequence[Stream], folder: Path
    ) -> None:
        self.run_config, length = run, plan.phases[0].max_seq_len
        self.rows = {
            name: HeldOutRows(stream, length, config.rows, run.seed)
            for name, stream in zip(run.data.streams, open_streams(run.data, "validation"), strict=True)
        }

    def run(self, model: FlexBertForMaskedLM, step: int) -> Mapping[str, Any]:
        return {name: self._similarity(model, rows) for name, rows in self.rows.items()}

    def _similarity(self, model: FlexBertForMaskedLM, rows: HeldOutRows) -> float | None:
        config = self.run_config
        tokenizer = partial(tokenizer_folder, config.data)
        batches = rows.batches(1, config.evaluation.masking, tokenizer, ranks.rank(), ranks.world_size())
        sums = torch.zeros(model.config.hidden_size + 1, dtype=torch.float64)  # of unit vectors, and how many there are
        for batch in batches:
            device = next(model.parameters()).device
            ids, bounds = batch["input_ids"].to(device), batch["cu_seqlens"].to(device)
            states = model.within(lambda model: model.encoder(ids, bounds, batch["max_seqlen"]))  # noqa: B023
            if len(bounds) < 2:  # there were no rows left for this rank; the model ran, for others wait for it
                continue
            means = torch.segment_reduce(states.float(), "mean", lengths=bounds.diff())
            units = torch.nn.functional.normalize(means, dim=1).double()
            sums += torch.cat([units.sum(0), units.new_tensor([len(units)])]).cpu()
        *total, count = ranks.over_ranks(sums).tolist()
        # The square of the sum holds every pair twice, and each document with itself.
        return (sum(x * x for x in total) - count) / (count * (count - 1)) if count > 1 else None
