"""Batches of one size, for compiled blocks."""

import torch
import torch.nn.functional as F

from data.loader import Batch
from data.masking import IGNORE


def fill_slots(batch: Batch) -> Batch:
    """The batch with its empty slots (about 1 in 1,000) as one more document, of token 0, which no label asks for, in a
    row of its own: so all microbatches of a phase have rows x max_seq_len tokens, and its blocks compile once."""
    empty = batch["slots"] - len(batch["input_ids"])
    if not empty:
        return batch
    end = batch["cu_seqlens"].new_full((1,), batch["slots"])
    return {
        **batch,
        "input_ids": F.pad(batch["input_ids"], (0, empty)),
        "labels": F.pad(batch["labels"], (0, empty), value=IGNORE),
        "cu_seqlens": torch.cat((batch["cu_seqlens"], end)),
        "row_bounds": torch.cat((batch["row_bounds"], end)),
        "max_seqlen": max(batch["max_seqlen"], empty),
    }
