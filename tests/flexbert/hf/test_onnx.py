"""ONNX exports: what onnxruntime computes is what transformers does, for every architecture and head."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from flexbert import build, to_hf
from flexbert.hf.onnx import ONNX_TOLERANCE, to_onnx
from flexbert_core.schema import ConfigError
from tests.helpers.architectures import BERT, IDS, SANDWICH
from tests.helpers.models import tiny
from tests.helpers.tokenizer import tokenizer_of

onnxruntime: Any = pytest.importorskip("onnxruntime", reason="of requirements-eval.txt")

SLOW = pytest.mark.slow
WITH_TYPES = ("bert", "own code")
ARCHITECTURES: dict[str, Any] = {
    "modernbert": {},
    "bert": BERT,
    "roberta": {
        **BERT,
        "embedding": {"name": "tokens", "token_types": 1},
        "position": {"name": "learned", "offset": 4},
        "head": {"name": "mlm", "dense_bias": True},
    },
    "own code": SANDWICH,
    "own code, alibi": {"position": "alibi", "norm": "rmsnorm"},
}


def run(folder: Path, ids: list[list[int]], types: bool) -> Any:
    """With rows filled up to the longest."""
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    longest = max(map(len, ids))
    given = {
        "input_ids": np.array([[*row, *[3] * (longest - len(row))] for row in ids]),
        "attention_mask": np.array([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
    }
    if types:
        given["token_type_ids"] = np.zeros_like(given["input_ids"])
    return session.run(None, given)[0]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("modernbert", "own code") else SLOW) for name in ARCHITECTURES]
)
def test_the_graph_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    to_hf(build(tiny(**ARCHITECTURES[name], **IDS)), tokenizer_of(97), tmp_path / "export")
    done = to_onnx(tmp_path / "export", tmp_path / "onnx")
    assert done.output == "logits"
    assert done.inputs == ("input_ids", "attention_mask", "token_type_ids")[: 3 if name in WITH_TYPES else 2]
    assert 0 < done.largest_difference < 2e-5
    assert done.shapes[-1] == (2, 256)
    files = {file.name for file in (tmp_path / "onnx").iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json"} <= files
    assert not any(file.endswith((".safetensors", ".py", "parity.json")) for file in files)
    # Sizes that were not traced, rows of other lengths, and one row alone, against transformers one by one.
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    for ids in ([[5, 6, 7]], [[9] * 150, [5, 8, 11], [6] * 70], [[7], [8], [9], [10]]):
        logits = torch.from_numpy(run(tmp_path / "onnx", ids, name in WITH_TYPES))
        for row, numbers in zip(logits, ids, strict=True):
            with torch.no_grad():
                expected = theirs(input_ids=torch.tensor([numbers])).logits[0]
            torch.testing.assert_close(row[: len(numbers)], expected, atol=ONNX_TOLERANCE, rtol=0)


@SLOW
@pytest.mark.parametrize(
    "head", [{"name": "classification", "pooling": "mean", "num_labels": 3}, {"name": "tokens", "num_labels": 3}]
)
def test_heads_for_fine_tuning_and_none(head: Any, tmp_path: Path) -> None:
    task: Any = head["name"]
    to_hf(build(tiny(head=head), task), tokenizer_of(97), tmp_path / "export")
    done = to_onnx(tmp_path / "export", tmp_path / "onnx")
    ids = [[9] * 20, [5, 8, 11]]
    shape = (2, 3) if task == "classification" else (2, 20, 3)
    assert (done.output, run(tmp_path / "onnx", ids, False).shape) == ("logits", shape)


def test_a_folder_without_a_head_gives_hidden_states(tmp_path: Path) -> None:
    to_hf(build(tiny(**BERT)), tokenizer_of(97), tmp_path / "export")
    AutoModel.from_pretrained(tmp_path / "export").save_pretrained(tmp_path / "headless")
    AutoTokenizer.from_pretrained(tmp_path / "export").save_pretrained(tmp_path / "headless")
    done = to_onnx(tmp_path / "headless", tmp_path / "onnx")
    assert done.output == "last_hidden_state"
    assert run(tmp_path / "onnx", [[9] * 20, [5, 8, 11]], True).shape == (2, 20, 48)


def test_other_folders_are_not_overwritten(tmp_path: Path) -> None:
    to_hf(build(tiny()), tokenizer_of(97), tmp_path / "export")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="onnx: exists: choose another folder"):
        to_onnx(tmp_path / "export", tmp_path / "onnx")
    assert [file.name for file in (tmp_path / "onnx").iterdir()] == ["thesis.tex"]
