"""Prints how far an export's logits are from the expected ones. Run by verify.py in a process of its own:

    python -I check_export.py FOLDER EXPECTED.safetensors     (input_ids, lengths of the sequences, logits, padding)

It runs the code that the folder carries, with FlexBERT out of reach, as a user of the export would.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@torch.no_grad()
def largest_difference(model: Any, sequences: Sequence[Tensor], expected: Sequence[Tensor], padding: int) -> float:
    """Of a transformers model's logits from the expected ones (S, V) of each sequence (S,): one by one, and of the
    short ones in one batch, filled up with the id `padding`. NaN if any difference is."""
    pairs = [(model(input_ids=ids[None]).logits[0], logits) for ids, logits in zip(sequences, expected, strict=True)]
    short = [ids for ids in sequences if len(ids) <= 64]  # the batch costs what its longest does, times its rows
    mask = pad_sequence([torch.ones_like(ids) for ids in short], batch_first=True)
    padded = model(input_ids=pad_sequence(short, batch_first=True, padding_value=padding), attention_mask=mask).logits
    pairs += [(row[: len(logits)], logits) for row, logits in zip(padded, expected, strict=False)]
    return float(torch.stack([(ours - theirs).abs().max() for ours, theirs in pairs]).max())


def main(folder: str, expected_file: str) -> None:
    sys.modules["flexbert"] = None  # pyright: ignore[reportArgumentType]  importing it now raises ImportError
    from safetensors.torch import load_file
    from transformers import AutoModelForMaskedLM

    expected = load_file(expected_file)
    model = AutoModelForMaskedLM.from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, use_safetensors=True, dtype=torch.float32
    ).eval()
    lengths = expected["lengths"].tolist()
    ids, logits = expected["input_ids"].split(lengths), expected["logits"].split(lengths)
    sys.stdout.write(f"{largest_difference(model, ids, logits, int(expected['padding']))}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
