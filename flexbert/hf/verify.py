"""Promise 8: an export is loaded by transformers and compared before it is published."""

import copy
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexbert.hf.check_export import largest_difference
from flexbert.model import FlexBertForMaskedLM
from flexbert_core.schema import RunError

# Largest difference between our logits and the export's: float32, other kernels; measured below 1e-5 on every preset.
LOGIT_TOLERANCE = 1e-4
PARITY_FILE = "parity.json"
"""Of an export: what its verification measured."""

_CHECK_FILE = Path(__file__).with_name("check_export.py")


@torch.no_grad()
def verify_export(
    model: FlexBertForMaskedLM, folder: Path, pad_token_id: int | None, carries_code: bool
) -> dict[str, Any]:
    """Raise RunError unless transformers loads `folder` and gives `model`'s logits, one sequence at a time and of
    sequences padded to one length. Returns what was measured, plain values for PARITY_FILE.

    carries_code: the folder's own modeling file is run, in a process that cannot import FlexBERT.
    """
    from transformers import AutoModelForMaskedLM, AutoTokenizer, PretrainedConfig

    # transformers' ModernBERT imports torch's compiler, which would start a process for each core and leave it there.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    config = model.config
    # The model as it is, not as its config says, but in float32 on the CPU like the export
    weights = {id(weight): nn.Parameter(weight.detach().to("cpu", torch.float32)) for weight in model.parameters()}
    reference = copy.deepcopy(model, weights).eval()
    for module in reference.modules():
        if hasattr(getattr(module, "config", None), "backend"):
            module.config = module.config.model_copy(update={"backend": "sdpa"})  # pyright: ignore
    longest = 2 * getattr(config.attention, "window_per_side", 64) + 9
    lengths = [min(length, config.max_position_embeddings) for length in (1, 7, 33, longest)]
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, config.vocab_size, (sum(lengths),), generator=generator)
    if pad_token_id is not None:  # a real token with this id would be taken for padding
        input_ids[input_ids == pad_token_id] = (pad_token_id + 1) % config.vocab_size
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    ours = reference(input_ids, cu_seqlens, max(lengths)).logits
    if carries_code:
        difference = _difference_without_flexbert(folder, input_ids, lengths, ours, pad_token_id or 0)
    else:
        with torch.random.fork_rng(devices=[]):
            exported = AutoModelForMaskedLM.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation="sdpa",  # where flash-attn is installed, ModernBERT takes that, on the CPU too
            ).eval()
        difference = largest_difference(exported, input_ids.split(lengths), ours.split(lengths), pad_token_id or 0)
    if not difference <= LOGIT_TOLERANCE:  # not `>`: NaN must fail too
        raise RunError(f"{folder}: the export's logits differ from the model's by {difference:.2e}: not published")
    # From the tokenizer's own files: to look at the model's, transformers 5 would ask on stdin whether to run its code.
    known = {"config": PretrainedConfig()} if carries_code else {}
    if len(AutoTokenizer.from_pretrained(folder, local_files_only=True, **known)) > config.vocab_size:
        raise RunError(f"{folder}: the tokenizer read back has more entries than the model: not published")
    return {
        "largest_logit_difference": difference,
        "tolerance": LOGIT_TOLERANCE,
        "dtype": "float32",
        "sequence_lengths": lengths,
        "transformers": version("transformers"),
        "torch": torch.__version__,
    }


def _difference_without_flexbert(
    folder: Path, input_ids: Tensor, lengths: list[int], logits: Tensor, pad_token_id: int
) -> float:
    """Largest difference from `logits` of what a fresh process computes with the folder's own code.

    Raises RunError with the last line of its error output when that process fails.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as scratch:
        numbers = {"lengths": torch.tensor(lengths), "padding": torch.tensor(pad_token_id)}
        expected = {"input_ids": input_ids, "logits": logits.contiguous(), **numbers}
        save_file(expected, Path(scratch) / "expected.safetensors")
        # Isolated (-I): neither the working directory nor PYTHONPATH can lend it FlexBERT. transformers copies the
        # folder's code to HF_MODULES_CACHE.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch, "CUDA_VISIBLE_DEVICES": ""}
        arguments = [sys.executable, "-I", str(_CHECK_FILE), str(folder), f"{scratch}/expected.safetensors"]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no error output"]
        raise RunError(f"{folder}: transformers cannot load the export: {lines[-1]}: not published")
    return float(done.stdout.split()[-1])
