"""Prints how far an export's logits are from the expected ones. Run by verify.py in a process of its own:

    python -I check_export.py FOLDER EXPECTED.safetensors AUTO_CLASS

EXPECTED holds input_ids of all sequences, their lengths, logits with the number of rows of each, and the padding id. It
runs the code that the folder carries, with FlexBERT out of reach, as a user of the export would.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# Longer sequences are compared one by one only: a padded batch costs what its longest does, times its rows.
PADDED_TOKENS = 512


@torch.no_grad()
def largest_difference(model: Any, sequences: Sequence[Tensor], expected: Sequence[Tensor], padding: int) -> float:
    """Of a transformers model's logits from the expected ones of each sequence (S,), which are (S, V) or, of a
    classifier of sequences, (C,): one by one, and of the shorter ones in one batch, filled up with the id `padding`.
    NaN if any difference is."""
    pairs = [(model(input_ids=ids[None]).logits[0], logits) for ids, logits in zip(sequences, expected, strict=True)]
    short = [number for number, ids in enumerate(sequences) if len(ids) <= PADDED_TOKENS]
    ids = [sequences[number] for number in short]
    mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
    padded = model(input_ids=pad_sequence(ids, batch_first=True, padding_value=padding), attention_mask=mask).logits
    for row, number in zip(padded, short, strict=True):
        logits = expected[number]
        pairs.append((row if logits.ndim == 1 else row[: len(logits)], logits))
    return float(torch.stack([(ours - theirs).abs().max() for ours, theirs in pairs]).max())


def main(folder: str, expected_file: str, auto_class: str) -> None:
    sys.modules["flexbert"] = None  # pyright: ignore[reportArgumentType]  importing it now raises ImportError
    import transformers
    from safetensors.torch import load_file

    expected = load_file(expected_file)
    model = getattr(transformers, auto_class).from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, use_safetensors=True, dtype=torch.float32
    )
    ids = expected["input_ids"].split(expected["lengths"].tolist())
    rows = expected["rows"].tolist()  # 0: the logits of a whole sequence, one row
    logits = [
        part.squeeze(0) if count == 0 else part
        for part, count in zip(expected["logits"].split([max(count, 1) for count in rows]), rows, strict=True)
    ]
    sys.stdout.write(f"{largest_difference(model.eval(), ids, logits, int(expected['padding']))}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
