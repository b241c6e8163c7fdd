"""Promise 8: an export is loaded by transformers and compared before it is published."""

import copy
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexbert.config import FlexBertConfig
from flexbert.hf.check_export import largest_difference
from flexbert.hf.task_heads import TASKS
from flexbert.kernels import linear
from flexbert.model import FlexBertForMaskedLM
from flexbert.tasks import FlexBertForSequenceClassification, FlexBertForTokenClassification
from flexbert_core.schema import RunError

Exportable = FlexBertForMaskedLM | FlexBertForSequenceClassification | FlexBertForTokenClassification

# Largest difference between our logits and the export's: float32, other kernels; measured below 1e-5 on every preset.
LOGIT_TOLERANCE = 1e-4
PARITY_FILE = "parity.json"
"""Of an export: what its verification measured."""
# Of the one long input, which bounds what the comparison costs: multiply-adds of the parameters, and numbers of its
# logits (1 GiB).
_MOST_PRODUCTS, _MOST_LOGITS = 5e11, 2**28

_CHECK_FILE = Path(__file__).with_name("check_export.py")


@dataclass(frozen=True)
class Comparison:
    """Of an export's logits, as transformers computes them, with the model's: on random tokens, one sequence at a time
    and padded to one length against packed, where tokens are masked, and on one input of the full length."""

    largest_difference: float
    """Of any logit, float32 on the CPU."""
    lengths: list[int]
    """Tokens of the sequences that were compared; the longest is the model's longest, or what a large model could be
    asked for here."""

    def facts(self) -> dict[str, Any]:
        """Plain values, for PARITY_FILE."""
        return {
            "largest_logit_difference": self.largest_difference,
            "tolerance": LOGIT_TOLERANCE,
            "dtype": "float32",
            "sequence_lengths": self.lengths,
            "transformers": version("transformers"),
            "torch": torch.__version__,
        }


@torch.no_grad()
def verify_export(model: Exportable, folder: Path, pad_token_id: int | None, carries_code: bool) -> Comparison:
    """Raise RunError unless transformers loads `folder` and gives `model`'s logits.

    carries_code: the folder's own modeling file is run, in a process that cannot import FlexBERT.
    """
    import transformers
    from transformers import AutoTokenizer, PretrainedConfig

    # transformers' ModernBERT imports torch's compiler, which would start a process for each core and leave it there.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    config = model.config
    reference = _reference(model)
    mask_token_id = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("mask_token_id")
    parameters = sum(parameter.numel() for parameter in reference.parameters())
    sequences = _sequences(config, pad_token_id, mask_token_id, parameters)
    expected = _expected(reference, sequences)
    auto_class = f"AutoModel{TASKS.get(task_of(model), 'ForMaskedLM')}"
    if carries_code:
        difference = _difference_without_flexbert(folder, sequences, expected, pad_token_id or 0, auto_class)
    else:
        with torch.random.fork_rng(devices=[]):
            exported = getattr(transformers, auto_class).from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation="sdpa",  # where flash-attn is installed, ModernBERT takes that, on the CPU too
            )
        difference = largest_difference(exported.eval(), sequences, expected, pad_token_id or 0)
    if not difference <= LOGIT_TOLERANCE:  # not `>`: NaN must fail too
        raise RunError(f"{folder}: the export's logits differ from the model's by {difference:.2e}: not published")
    # From the tokenizer's own files: to look at the model's, transformers 5 would ask on stdin whether to run its code.
    known = {"config": PretrainedConfig()} if carries_code else {}
    if len(AutoTokenizer.from_pretrained(folder, local_files_only=True, **known)) > config.vocab_size:
        raise RunError(f"{folder}: the tokenizer read back has more entries than the model: not published")
    return Comparison(difference, [len(ids) for ids in sequences])


def task_of(model: Exportable) -> str:
    """The task of `build` that gave it."""
    kinds = {FlexBertForSequenceClassification: "classification", FlexBertForTokenClassification: "tokens"}
    return next((task for kind, task in kinds.items() if isinstance(model, kind)), "mlm")


def _reference(model: Exportable) -> Any:
    """The model as it is, not as its config says, but in float32 on the CPU like the export."""
    weights = {id(weight): nn.Parameter(weight.detach().to("cpu", torch.float32)) for weight in model.parameters()}
    reference = copy.deepcopy(model, weights).eval()
    for module in reference.modules():
        if hasattr(getattr(module, "config", None), "backend"):
            module.config = module.config.model_copy(update={"backend": "sdpa"})  # pyright: ignore
    return reference


def _sequences(
    config: FlexBertConfig, pad_token_id: int | None, mask_token_id: int | None, parameters: int
) -> list[Tensor]:
    """Random ids: of one token, of lengths around a window's, one that is masked in every third place, and one as long
    as the model takes, or as is affordable."""
    longest = 2 * getattr(config.attention, "window_per_side", 64) + 9
    lengths = [min(length, config.max_position_embeddings) for length in (1, 7, 33, longest, 33)]
    affordable = int(min(_MOST_PRODUCTS // parameters, _MOST_LOGITS // config.vocab_size))
    full = min(config.max_position_embeddings, affordable)
    if full > max(lengths):
        lengths.append(full)
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, config.vocab_size, (length,), generator=generator) for length in lengths]
    if pad_token_id is not None:  # a real token with this id would be taken for padding
        for ids in sequences:
            ids[ids == pad_token_id] = (pad_token_id + 1) % config.vocab_size
    if mask_token_id is not None and mask_token_id != pad_token_id:
        sequences[4][::3] = mask_token_id
    return sequences


def _expected(reference: Any, sequences: list[Tensor]) -> list[Tensor]:
    """Logits of each sequence, of one packed batch; the longest by itself. Where every third token of the fifth is
    masked, they are computed as in training: of those tokens only."""
    found: list[Tensor] = []
    for part in (sequences[:5], sequences[5:]):
        if not part:
            continue
        lengths = [len(ids) for ids in part]
        ids, cu_seqlens = torch.cat(part), torch.tensor([0, *lengths]).cumsum(0).int()
        logits = reference(ids, cu_seqlens, max(lengths)).logits
        found += list(logits) if task_of(reference) == "classification" else list(logits.split(lengths))
    if isinstance(reference, FlexBertForMaskedLM):
        ids = sequences[4]
        masked = torch.arange(0, len(ids), 3)
        bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
        weight, bias = reference.head.decoder(reference.encoder.token_table)
        states = reference.encoder(ids, bounds, len(ids), wanted=masked)
        found[4] = found[4].index_copy(0, masked, linear(reference.head(states), weight, bias))
    return found


def _difference_without_flexbert(
    folder: Path, sequences: list[Tensor], logits: list[Tensor], pad_token_id: int, auto_class: str
) -> float:
    """Largest difference from `logits` of what a fresh process computes with the folder's own code.

    Raises RunError with the last line of its error output when that process fails.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as scratch:
        expected = {
            "input_ids": torch.cat(sequences),
            "lengths": torch.tensor([len(ids) for ids in sequences]),
            "logits": torch.cat([each[None] if each.ndim == 1 else each for each in logits]),
            "rows": torch.tensor([0 if each.ndim == 1 else len(each) for each in logits]),
            "padding": torch.tensor(pad_token_id),
        }
        save_file(expected, Path(scratch) / "expected.safetensors")
        # Isolated (-I): neither the working directory nor PYTHONPATH can lend it FlexBERT. transformers copies the
        # folder's code to HF_MODULES_CACHE.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch, "CUDA_VISIBLE_DEVICES": ""}
        arguments = [sys.executable, "-I", str(_CHECK_FILE), str(folder), f"{scratch}/expected.safetensors", auto_class]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no error output"]
        raise RunError(f"{folder}: transformers cannot load the export: {lines[-1]}: not published")
    return float(done.stdout.split()[-1])
