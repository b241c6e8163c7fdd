"""Runs of the sections: random documents as a stream, and run files over it."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.tokenizer import fingerprint
from tests.helpers.synthetic import SPECIAL, documents, write_stream


def write_data(folder: Path, vocabulary: int, longest: int, count: int) -> Path:
    """One stream of random documents of 1 to `longest` tokens, most of them short, with a tokenizer."""
    names = {f"[{name.upper()}]": number for name, number in SPECIAL.items()}
    words = {**names, **{f"w{number}": number for number in range(len(names), vocabulary)}}
    model = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    roles: dict[str, Any] = {f"{name}_token": f"[{name.upper()}]" for name in SPECIAL}
    PreTrainedTokenizerFast(tokenizer_object=model, **roles).save_pretrained(folder / "tokenizer")
    mark = fingerprint(folder / "tokenizer")
    for split, share in (("train", 1.0), ("validation", 0.1)):
        docs = documents(len(split), max(8, round(share * count)), longest, vocabulary)
        write_stream(folder / "stream", split, docs, vocabulary, shard_bytes=1 << 20, tokenizer=mark)
    return folder


def write_config(
    folder: Path, data: Path, model: dict[str, Any], steps: int, row: int, rows: int, **changes: Any
) -> Path:
    """A run file of so many steps; its run is in FOLDER/run. model: over the preset modernbert-tiny or its own."""
    folder.mkdir(parents=True, exist_ok=True)
    phase = {"name": "all", "tokens": steps * rows * row, "max_seq_len": row, "global_batch_size": rows, "lr": 1e-3}
    node = {
        "name": "run",
        "runs": str(folder),
        "model": {"preset": "modernbert-tiny", **model},
        "data": {"tokenizer": str(data / "tokenizer"), "streams": {"stream": {"path": str(data / "stream")}}},
        "phases": [phase],
        "checkpoint": {"interval": rows * row, "keep": 100},
        "evaluation": {"max_rows": 4},
    }
    OmegaConf.save(OmegaConf.merge(node, {"trainer": {"log_interval": 1}}, changes), folder / "train.yaml")
    return folder / "train.yaml"
