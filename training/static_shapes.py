"""Batches of one size, for compiled blocks."""

import torch
import torch.nn.functional as F

from data.feed.batches import Batch
from data.feed.masking import IGNORE


def fill_slots(batch: Batch) -> Batch:
    """The batch with its empty slots (about 1 in 1,000) as further documents, of token 0, which no label asks for, in a
    row of their own: so all microbatches of a phase have rows x max_seq_len tokens, and its blocks compile once.

    None of them is longer than a row: a table of positions need not reach further."""
    empty = batch["slots"] - len(batch["input_ids"])
    if not empty:
        return batch
    bounds, row = batch["cu_seqlens"], batch["slots"] // len(batch["sequences"])
    ends = [*range(batch["slots"] - empty + row, batch["slots"], row), batch["slots"]]
    return {
        **batch,
        "input_ids": F.pad(batch["input_ids"], (0, empty)),
        "labels": F.pad(batch["labels"], (0, empty), value=IGNORE),
        "cu_seqlens": torch.cat((bounds, bounds.new_tensor(ends))),
        "row_bounds": torch.cat((batch["row_bounds"], bounds.new_tensor(ends[-1:]))),
        "max_seqlen": max(batch["max_seqlen"], min(empty, row)),
    }
