"""An export as one ONNX graph, compared with itself in onnxruntime before it is published.

The graph has `input_ids` and `attention_mask` (batch, sequence) int64, with models of several token types
`token_type_ids`, too; it gives `logits`, or `last_hidden_state` of a folder without a head. Both axes are dynamic. It
is traced from the padded path of the class that transformers loads.
"""

import importlib.util
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexbert.hf.verify import PARITY_FILE
from flexbert_core.durable import new_folder
from flexbert_core.schema import ConfigError, RunError

FILE = "model.onnx"
OPSET = 18
# Largest difference of any output between onnxruntime and torch, float32 on the CPU; measured: see tests.
ONNX_TOLERANCE = 1e-4
_PACKAGES = ("onnx", "onnxruntime")
_KINDS = {
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
}
# Left behind: what the graph replaces, and what was measured of it.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".py", PARITY_FILE)


@dataclass(frozen=True)
class OnnxExport:
    """What was written: the graph's inputs and output, and how far onnxruntime is from torch on `shapes`."""

    inputs: tuple[str, ...]
    output: str
    largest_difference: float
    shapes: tuple[tuple[int, int], ...]


class _Padded(nn.Module):
    """One output of a model, with inputs by place."""

    def __init__(self, model: Any, names: tuple[str, ...], output: str) -> None:
        super().__init__()
        self.model, self.names, self.output = model, names, output
        self.eval()  # the exporter puts back the mode that it finds here, and of all inside

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=True)[self.output]


def to_onnx(folder: Path, out_dir: Path) -> OnnxExport:
    """Write model.onnx, with config and tokenizer beside it, of a folder that transformers loads.

    The code that an own-code export carries is run. Raises ConfigError without the packages, for a folder that cannot
    be loaded, an `out_dir` that exists, and an architecture that cannot be traced; RunError when onnxruntime
    gives something else. Then nothing new is under `out_dir`.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--onnx: {', '.join(missing)}: not installed: pip install -r requirements-eval.txt")
    if out_dir.exists():
        raise ConfigError(f"{out_dir}: exists: choose another folder, or remove it")
    model, output = _load(folder)
    names = _inputs(model)
    longest = _longest(model)
    with new_folder(out_dir) as beside:
        for file in folder.iterdir():
            if file.is_file() and not file.name.endswith(_WEIGHTS):
                shutil.copy(file, beside)
        _trace(_Padded(model, names, output), names, output, longest, beside / FILE, folder)
        shapes = tuple(
            dict.fromkeys((rows, min(slots, longest)) for rows, slots in ((1, 1), (1, 7), (3, 33), (2, 300)))
        )
        difference = _difference(model, names, output, shapes, beside / FILE)
        if not difference <= ONNX_TOLERANCE:  # not `>`: NaN must fail too
            raise RunError(f"{out_dir}: the graph's {output} differ from torch's by {difference:.2e}: not published")
    return OnnxExport(names, output, difference, shapes)


def _load(folder: Path) -> tuple[Any, str]:
    """The model and the name of its output."""
    import transformers

    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (architecture, *_) = config.get("architectures") or [""]
    kind = next((auto for suffix, auto in _KINDS.items() if architecture.endswith(suffix)), "AutoModel")
    if config.get("parts"):
        raise ConfigError(
            f"{folder}: --onnx: has parts from outside, which compute on unpadded batches: their sizes depend on the "
            "data, which a graph cannot hold"
        )
    try:
        model = getattr(transformers, kind).from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=True,
            dtype=torch.float32,
            attn_implementation="sdpa",
        )
    except Exception as error:  # the loaders raise bare Exception among others
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{folder}: transformers cannot load it: {said}") from None
    model.config.return_dict = True
    return model.eval(), "last_hidden_state" if kind == "AutoModel" else "logits"


def _inputs(model: Any) -> tuple[str, ...]:
    """token_type_ids where the model has two types or more."""
    config = model.config
    types = getattr(config, "type_vocab_size", 0) or 0
    if config.model_type == "flexbert":
        types = config.flexbert["embedding"].get("token_types", 0)
    names = ("input_ids", "attention_mask")
    return (*names, "token_type_ids") if types >= 2 else names


def _longest(model: Any) -> int:
    """Tokens that it takes: RoBERTa's positions start behind the padding's."""
    positions = int(model.config.max_position_embeddings)
    is_roberta = model.config.model_type in ("roberta", "xlm-roberta", "camembert")
    return positions - int(model.config.pad_token_id) - 1 if is_roberta else positions


def _trace(module: nn.Module, names: tuple[str, ...], output: str, longest: int, file: Path, folder: Path) -> None:
    example = _batch(module.model, names, 2, min(19, longest), seed=0)  # pyright: ignore[reportArgumentType]
    axes = {0: "batch", 1: "sequence"}
    of_output = {0: "batch"} if output == "logits" and _is_of_sequences(module.model) else axes
    with _quiet(), torch.no_grad():
        try:
            torch.onnx.export(
                module,
                tuple(example.values()),
                str(file),
                input_names=list(names),
                output_names=[output],
                dynamic_axes={**{name: axes for name in names}, output: of_output},
                opset_version=OPSET,
                dynamo=False,
            )
        except Exception as error:  # the exporter raises many kinds
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise ConfigError(f"{folder}: --onnx: torch cannot trace {type(module.model).__name__}: {said}") from None


def _is_of_sequences(model: Any) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer names each Python value that it takes for a constant
        yield


def _batch(model: Any, names: tuple[str, ...], rows: int, slots: int, seed: int) -> dict[str, Tensor]:
    """Random tokens; each row after the first is shorter by a third of the slots than the one before, and padded."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size, padding = int(model.config.vocab_size), model.config.pad_token_id or 0
    ids = torch.randint(0, vocab_size, (rows, slots), generator=generator)
    ids[ids == padding] = (padding + 1) % vocab_size
    lengths = [max(1, slots - row * (slots // 3)) for row in range(rows)]
    mask = torch.tensor([[1] * length + [0] * (slots - length) for length in lengths])
    types = torch.randint(0, 2, (rows, slots), generator=generator) * mask
    given = {"input_ids": ids.where(mask.bool(), padding), "attention_mask": mask, "token_type_ids": types}
    return {name: given[name] for name in names}


@torch.no_grad()
def _difference(
    model: Any, names: tuple[str, ...], output: str, shapes: tuple[tuple[int, int], ...], file: Path
) -> float:
    """Largest of any real token's (or sequence's) output, over padded batches of these shapes. NaN if any is."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    found = []
    for number, (rows, slots) in enumerate(shapes):
        batch = _batch(model, names, rows, slots, seed=number + 1)
        expected = model(**batch, return_dict=True)[output]
        (graph,) = session.run([output], {name: tensor.numpy() for name, tensor in batch.items()})
        difference = (torch.from_numpy(graph) - expected).abs()
        real = batch["attention_mask"].bool()
        found.append((difference if _is_of_sequences(model) else difference[real]).max())
    return float(torch.stack(found).max())
