"""Runs of a second: a tiny model on synthetic streams, prepared without any text.

Rows hold one document each. Stream `full` has ordinary tokens only, `sparse` one in eight; `empty` has none at all:
special tokens throughout, which are never masked. So masked counts of rows differ widely, down to zero.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from data.tokenizer import fingerprint
from tests.helpers.synthetic import SPECIAL, write_stream

ROW, ROWS, VOCABULARY = 32, 8, 64
_ORDINARY = {"full": 1.0, "sparse": 1 / 8, "empty": 0.0}


def write_data(folder: Path) -> Path:
    names = {f"[{name.upper()}]": number for name, number in SPECIAL.items()}
    words = {**names, **{f"w{number}": number for number in range(len(names), VOCABULARY)}}
    model = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    roles: dict[str, Any] = {f"{name}_token": f"[{name.upper()}]" for name in SPECIAL}
    PreTrainedTokenizerFast(tokenizer_object=model, **roles).save_pretrained(folder / "tokenizer")
    rng = np.random.default_rng(5)
    for stream, share in _ORDINARY.items():
        for split, count in (("train", 60), ("validation", 4)):
            documents = rng.integers(len(SPECIAL), VOCABULARY, (count, ROW - 2))
            documents[rng.random(documents.shape) >= share] = SPECIAL["unk"]
            path = write_stream(folder / stream, split, list(documents), VOCABULARY)
            manifest = json.loads((path / "stream.json").read_text())
            manifest["tokenizer_fingerprint"] = fingerprint(folder / "tokenizer")
            (path / "stream.json").write_text(json.dumps(manifest))
    return folder


def write_config(folder: Path, data: Path, steps: int, /, *streams: str, **changes: Any) -> Path:
    """A run file of so many steps, a checkpoint after each; its run is in FOLDER/run."""
    node: dict[str, Any] = {
        "name": "run",
        "runs": str(folder),
        "model": {
            "preset": "modernbert-tiny",
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "intermediate_size": 24,
            "max_position_embeddings": 2 * ROW,
        },
        "data": {
            "tokenizer": str(data / "tokenizer"),
            "streams": {name: {"path": str(data / name)} for name in streams or _ORDINARY},
            "num_workers": 0,
            "lanes": 4,
        },
        "phases": [
            {"name": "all", "tokens": steps * ROWS * ROW, "max_seq_len": ROW, "global_batch_size": ROWS, "lr": 1e-2}
        ],
        "checkpoint": {"interval": ROWS * ROW, "keep": 100},
        "evaluation": {"max_rows": 4},
        "trainer": {"log_interval": 1},
    }
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.merge(node, changes), folder / "train.yaml")
    return folder / "train.yaml"


STEPS, SAVED = 6, 3


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line] + [
        line["validation"]["loss"] for line in lines if "validation" in line
    ]


def tensors(folder: Path, steps: int = STEPS) -> dict[str, Tensor]:
    path = folder / "run" / "checkpoints" / f"tokens-{steps * ROWS * ROW}"
    return load_file(path / "model.safetensors") | load_file(path / "optimizer.safetensors")


def data_seen(folder: Path) -> list[Any]:
    """What the ledger says of the data, line by line."""
    return [json.loads(line) for line in (folder / "run" / "ledger.jsonl").read_text().splitlines()]


def check_same(folder: Path, other: Path) -> None:
    """Losses, weights, optimizer states and export to rounding; data exactly."""
    assert losses(folder) == pytest.approx(losses(other), rel=1e-5)
    assert data_seen(folder) == data_seen(other)
    ours, theirs = tensors(folder), tensors(other)
    exports = [
        load_file(path / "run/exports" / f"tokens-{STEPS * ROWS * ROW}/model.safetensors") for path in (folder, other)
    ]
    for left, right in ((ours, theirs), exports):
        assert left.keys() == right.keys()
        for name in right:
            scale = right[name].float().abs().max()
            # 40 times the worst measured
            assert (left[name].float() - right[name].float()).abs().max() <= 2e-3 * scale, name


def forget_after(folder: Path, steps: int) -> None:
    """Make a finished run one that was killed just after the checkpoint of `steps` steps."""
    for path in (folder / "run" / "checkpoints").iterdir():
        if int(path.name.split("-")[1]) > steps * ROWS * ROW:
            shutil.rmtree(path)
    shutil.rmtree(folder / "run" / "exports")
    (folder / "run" / "summary.json").unlink()
