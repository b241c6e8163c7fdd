"""Prints how far an export's logits are from the expected ones. Run by hf.to_hf in a process of its own:

    python -I check_export.py FOLDER EXPECTED.safetensors     (input_ids, lengths of the sequences, logits)

It runs the code that the folder carries, with FlexBERT out of reach, as a user of the export would.
"""

import sys

import torch
from safetensors.torch import load_file

sys.modules["flexbert"] = None  # pyright: ignore[reportArgumentType]  importing it now raises ImportError


@torch.no_grad()
def main(folder: str, expected_file: str) -> None:
    from transformers import AutoModelForMaskedLM

    expected = load_file(expected_file)
    model = AutoModelForMaskedLM.from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, use_safetensors=True, dtype=torch.float32
    ).eval()
    sequences = expected["input_ids"].split(expected["lengths"].tolist())
    logits = torch.cat([model(input_ids=ids[None]).logits[0] for ids in sequences])
    sys.stdout.write(f"{float((logits - expected['logits']).abs().max())}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
