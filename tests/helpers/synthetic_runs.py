"""Runs over synthetic streams, which take seconds in the test's own process."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data.tokenizer import fingerprint
from recipe.config import RunConfig, load_run_config
from tests.helpers.synthetic import documents, write_stream
from tests.helpers.tokenizer import tokenizer_of

RUN: dict[str, Any] = {
    "model": {
        "preset": "modernbert-tiny",
        "vocab_size": 512,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
        "attention": {"name": "multihead", "out_dropout": 0.1},
    },
    "phases": [{"name": "only", "tokens": "8K", "max_seq_len": 64, "global_batch_size": 8, "lr": 1e-3, "warmup": "1K"}],
    "checkpoint": {"interval": 1024, "keep": 100},
    "evaluation": {"max_rows": 4, "max_seq_len": 64},
    "trainer": {"log_interval": 1},
}


def write_dataset(folder: Path) -> Path:
    """One stream of random documents, and a tokenizer of as many words."""
    tokenizer_of(512).save_pretrained(folder / "tokenizer")
    for split, count in (("train", 300), ("validation", 30)):
        write_stream(folder / "words", split, documents(1, count, 60), tokenizer=fingerprint(folder / "tokenizer"))
    return folder


def run_config(folder: Path, dataset: Path, name: str, *overrides: str, **sections: Any) -> RunConfig:
    """A run in folder/runs/NAME. sections: top-level keys of the run file."""
    data = {"tokenizer": str(dataset / "tokenizer"), "streams": {"words": {"path": str(dataset / "words")}}}
    node = {"name": name, "runs": str(folder / "runs"), **RUN, "data": {**data, "num_workers": 0}, **sections}
    file = folder / f"{name}.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(node)))
    return load_run_config(file, overrides)
