"""`main.py export`: a model as a folder that transformers loads, or as an ONNX graph with its tokenizer."""

import shutil
import tempfile
from pathlib import Path

from rich.console import Console

from evals.models import resolve
from flexbert_core.durable import new_folder
from flexbert_core.schema import ConfigError


def export(source: str, output: Path, onnx: bool, console: Console) -> None:
    """source: a model as `eval` takes it. onnx: model.onnx instead of weights, checked in onnxruntime.

    Raises ConfigError for a source that is no model, an `output` that exists and, with onnx, an architecture that no
    graph can hold; RunError where the graph computes something else.
    """
    if output.exists():
        raise ConfigError(f"--output: {output}: exists: choose another folder, or remove it")
    with tempfile.TemporaryDirectory() as scratch:
        (model,) = resolve([source], Path(scratch))
        if not onnx:
            with new_folder(output) as beside:
                shutil.copytree(model.folder, beside, dirs_exist_ok=True)
            console.print(f"{output}: {model.label}", soft_wrap=True)
            return
        from flexbert.hf.onnx import FILE, to_onnx

        done = to_onnx(model.folder, output)
    shapes = ", ".join(f"{rows} x {slots}" for rows, slots in done.shapes)
    console.print(
        f"{output / FILE}: {model.label}: {', '.join(done.inputs)} -> {done.output}; onnxruntime is within "
        f"{done.largest_difference:.1e} of torch on padded batches of {shapes}",
        soft_wrap=True,
    )
